"""The report of a sweep: the choice, the frontier of effect against cost, the heat map, and the learning curve."""

from __future__ import annotations

import html as escaping
import math
from collections.abc import Mapping, Sequence
from typing import Any

from steer.reports import page
from vectors.registry.layers import together

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 760, 320, 64, 16, 44
COLUMNS = ("candidate", "strength", "effect", "p95 KL", "steady")


def rows(points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The points in the order of their layers, as cells under `COLUMNS`."""
    ordered = sorted(points, key=lambda each: (each["method"], each["layers"], each["strength"]))
    return [
        [
            name(each), f"{each['strength']:g}", f"{each['effect']:+.4f}", f"{each['p95']:.3g}",
            ("yes" if each["steady"] else "no") if each["within"] else "over budget",
        ]
        for each in ordered
    ]  # fmt: skip


def name(point: Mapping[str, Any]) -> str:
    """A candidate in words."""
    return f"{point['method']} {together(point['layers'])}"


def html(report: Mapping[str, Any], record: str) -> str:
    """The report as one page; `record` names the file with everything in numbers."""
    points, chosen, test = report["points"], report["chosen"], report["test"]
    counts, budget = report["counts"], report["config"]["budget"]
    if chosen is None:
        verdict = f"<p>Nothing is recommended: {escaping.escape(report['nothing_recommended'])}.</p>"
    else:
        verdict = f"<p>{escaping.escape(report['recommended']['reason'])}.</p>" + page.table(
            ["multiple of the strength", *(f"{each:g}" for each in test["multiples"])],
            [[f"test {report['metric']} ({report['unit']})", *(f"{each:.4f}" for each in test["margins"])]],
        )
    body = [
        verdict,
        "<h2>Effect against cost</h2>",
        frontier(points, chosen, budget, report["unit"]),
        "<h2>Effect by layer and strength</h2>",
        heat_map(points, chosen),
    ]
    if report.get("no_learning_curve"):
        body.append(page.notes([report["no_learning_curve"]]))
    if report["learning"]:
        body += ["<h2>How many examples it needs</h2>", learning_curve(report["learning"], report["unit"])]
    body += [
        "<h2>All points</h2>",
        page.table(COLUMNS, rows(points)),
        page.notes(
            [
                f"The effect is the rise of the mean figure of {counts['dev']} development items, in {report['unit']}; "
                f"the test figures are of {counts['test']} other items, measured at the chosen point alone.",
                "The cost is the 95th percentile of KL(unsteered || steered) over the tokens of what the unsteered "
                f"model wrote after {counts['neutral']} neutral prompts. The search spends a little less than the "
                f"budget of {budget:g} nats, since other text may cost more.",
                "Steady: at minus the strength the mean figure is less than without steering, at the strength greater.",
            ]
        ),
        page.facts({"digest of the run": report["digest"]}),
    ]
    return page.page("Sweep", "".join(body), record)


def frontier(points: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any] | None, budget: float, unit: str) -> str:
    """Effect against cost, one dot for each point, as SVG; the budget is the dashed line."""
    drawn = [each for each in points if each["p95"] > 0]
    if not drawn:
        return "<p class='note'>There is nothing to draw.</p>"
    right = 1.1 * max(budget, *(each["p95"] for each in drawn))
    low, high = _range([each["effect"] for each in drawn])
    x, y = _scale(0, right, LEFT, WIDTH - 12), _scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [_axes(x, y, (0, right), (low, high), "p95 KL on neutral text (nats)", f"effect ({unit})")]
    parts.append(
        f"<line x1='{x(budget):.1f}' x2='{x(budget):.1f}' y1='{TOP}' y2='{HEIGHT - BOTTOM}' stroke='#c33' "
        "stroke-dasharray='5 4'/>"
        f"<text x='{x(budget) - 4:.1f}' y='{TOP + 12}' text-anchor='end' fill='#c33'>budget</text>"
    )
    for each in drawn:
        best = _same(each, chosen)
        title = f"{name(each)}, strength {each['strength']:g}: {each['effect']:+.4f} at {each['p95']:.3g}"
        parts.append(
            f"<circle cx='{x(each['p95']):.1f}' cy='{y(each['effect']):.1f}' r='{6 if best else 4}' "
            f"fill='{'#c60' if best else '#27c'}'><title>{escaping.escape(title)}</title></circle>"
        )
        if best:
            parts.append(
                f"<text x='{x(each['p95']) - 10:.1f}' y='{y(each['effect']) + 4:.1f}' text-anchor='end'>"
                f"{escaping.escape(name(each))}</text>"
            )
    return _svg(parts, "Effect against cost")


def heat_map(points: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any] | None) -> str:
    """The effect of each candidate, darker the larger, as SVG.

    Columns are layers, rows are strengths of a grid; at the strengths of one budget there is one row for each method.
    """
    columns = sorted({tuple(each["layers"]) for each in points})
    methods = sorted({each["method"] for each in points})
    strengths = sorted({each["strength"] for each in points})
    grid = len(points) > len(columns) * len(methods)
    lines = [(m, s) for m in methods for s in strengths] if grid else [(m, None) for m in methods]
    low, high = (
        min(0.0, *(each["effect"] for each in points), 0.0),
        max(1e-9, *(each["effect"] for each in points), 1e-9),
    )
    cell = min(48.0, (WIDTH - 150) / len(columns))
    parts = []
    for row, (method, strength) in enumerate(lines):
        label = method if strength is None else f"{method} {strength:g}"
        parts.append(f"<text x='140' y='{TOP + 26 * row + 18}' text-anchor='end'>{escaping.escape(label)}</text>")
        for column, layers in enumerate(columns):
            here = [
                each for each in points
                if each["method"] == method and tuple(each["layers"]) == layers
                and (strength is None or each["strength"] == strength)
            ]  # fmt: skip
            if not here:
                continue
            point = max(here, key=lambda each: each["effect"])
            share = (point["effect"] - low) / (high - low)
            fill = f"rgb({round(235 - 200 * share)},{round(240 - 130 * share)},250)" if point["within"] else "#eee"
            title = f"{name(point)}, strength {point['strength']:g}: {point['effect']:+.4f} at {point['p95']:.3g} nats"
            edge = " stroke='#c60' stroke-width='3'" if _same(point, chosen) else ""
            parts.append(
                f"<rect x='{150 + cell * column:.1f}' y='{TOP + 26 * row}' width='{cell - 2:.1f}' height='24' "
                f"fill='{fill}'{edge}><title>{escaping.escape(title)}</title></rect>"
            )
    bottom = TOP + 26 * len(lines) + 16
    for column, layers in enumerate(columns):
        parts.append(
            f"<text x='{150 + cell * (column + 0.5) - 1:.1f}' y='{bottom}' text-anchor='middle' font-size='11'>"
            f"{escaping.escape(together(layers))}</text>"
        )
    parts.append(f"<text x='140' y='{bottom}' text-anchor='end' fill='#666'>layer</text>")
    return _svg(parts, "Effect by layer and strength", bottom + 10)


def learning_curve(learning: Sequence[Mapping[str, Any]], unit: str) -> str:
    """The effect by the number of examples, with its interval, as SVG."""
    values = [v for each in learning for v in (each["effect"], each["low"], each["high"]) if _finite(v)]
    sizes = [each["examples"] for each in learning]
    low, high = _range([0.0, *values])
    x = _scale(math.log(min(sizes)) - 0.2, math.log(max(sizes)) + 0.2, LEFT, WIDTH - 12)
    y = _scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [_axes(x, y, None, (low, high), "examples of each class", f"effect ({unit})")]
    line = " ".join(f"{x(math.log(each['examples'])):.1f},{y(each['effect']):.1f}" for each in learning)
    parts.append(f"<polyline points='{line}' fill='none' stroke='#27c' stroke-width='2'/>")
    for each in learning:
        at = x(math.log(each["examples"]))
        if _finite(each["low"]) and _finite(each["high"]):
            ends = f"y1='{y(each['low']):.1f}' y2='{y(each['high']):.1f}'"
            parts.append(f"<line x1='{at:.1f}' x2='{at:.1f}' {ends} stroke='#27c'/>")
        parts.append(f"<circle cx='{at:.1f}' cy='{y(each['effect']):.1f}' r='4' fill='#27c'/>")
        parts.append(f"<text x='{at:.1f}' y='{HEIGHT - BOTTOM + 16}' text-anchor='middle'>{each['examples']}</text>")
    return _svg(parts, "Learning curve")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _same(point: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    keys = ("method", "layers", "strength")
    return other is not None and all(point[key] == other[key] for key in keys)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(0.0, *values, 0.0), max(*values, 0.0)
    pad = 0.08 * (high - low) or 1e-6
    return low - (pad if low < 0 else 0), high + pad


def _scale(low: float, high: float, start: float, stop: float) -> Any:
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _axes(x: Any, y: Any, across: tuple[float, float] | None, up: tuple[float, float], under: str, beside: str) -> str:
    floor = HEIGHT - BOTTOM
    parts = [f"<path d='M{LEFT} {TOP}V{floor}H{WIDTH - 12}' fill='none' stroke='#999'/>"]
    for i in range(5):
        value = up[0] + (up[1] - up[0]) * i / 4
        parts.append(f"<text x='{LEFT - 6}' y='{y(value) + 4:.1f}' text-anchor='end'>{value:.2g}</text>")
        if across is not None:
            value = across[0] + (across[1] - across[0]) * i / 4
            parts.append(f"<text x='{x(value):.1f}' y='{floor + 16}' text-anchor='middle'>{value:.2g}</text>")
    parts.append(f"<text x='{(LEFT + WIDTH) / 2}' y='{HEIGHT - 8}' text-anchor='middle' fill='#666'>{under}</text>")
    turned = f"translate(14 {(TOP + floor) / 2}) rotate(-90)"
    parts.append(f"<text transform='{turned}' text-anchor='middle' fill='#666'>{beside}</text>")
    return "".join(parts)


def _svg(parts: Sequence[str], title: str, height: float = HEIGHT) -> str:
    return (
        f"<svg viewBox='0 0 {WIDTH} {height:g}' width='{WIDTH}' role='img' aria-label='{escaping.escape(title)}' "
        f"font-family='system-ui,sans-serif' font-size='12'>{''.join(parts)}</svg>"
    )
