"""The reports of probes: figures and calibration as tables and as a page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steer.reports import page

if TYPE_CHECKING:
    from probes.readouts.calibration import Bin
    from probes.readouts.figures import Figures

CALIBRATION = ["probability", "share of positives", "examples"]
FIGURES = {
    "auroc": "AUROC", "brier": "Brier score", "cross_entropy": "cross-entropy (nats)",
    "calibration_error": "calibration error",
}  # fmt: skip
NOTES = (
    "Both classes count the same in every figure; a probe that knows nothing has AUROC 0.5, Brier score 0.25 and "
    "cross-entropy 0.693.",
    "The interval of the AUROC is a bootstrap over examples at 95 %, no narrower than so few examples allow.",
)


def figure_rows(sets: Mapping[str, Figures]) -> list[list[str]]:
    """The figures of several sets of examples, one figure a row."""
    rows = [[label, *(f"{getattr(each, key):.3f}" for each in sets.values())] for key, label in FIGURES.items()]
    intervals = [f"{each.auroc_low:.3f} to {each.auroc_high:.3f}" for each in sets.values()]
    return [rows[0], ["95 % interval", *intervals], *rows[1:]]


def calibration_rows(curve: Sequence[Bin]) -> list[list[str]]:
    """A calibration curve, a bin a row."""
    return [[f"{each.probability:.3f}", f"{each.positive:.3f}", str(each.examples)] for each in curve]


def test_page(name: str, report: Mapping[str, Any]) -> str:
    """What `steer probe test` measured as one page; `report` is what --json prints."""
    sets = report["sets"]
    header = ["", *sets]
    rows = [[label, *(f"{each[key]:.3f}" for each in sets.values())] for key, label in FIGURES.items()]
    rows.insert(
        1, ["95 % interval", *(f"{each['auroc_low']:.3f} to {each['auroc_high']:.3f}" for each in sets.values())]
    )
    for key in ("true_positive", "false_negative", "false_positive", "true_negative"):
        rows.append([key.replace("_", " "), *(str(each[key]) for each in sets.values())])
    curves = "".join(
        f"<figure style='display:inline-block;margin:0 1rem 0 0'>{calibration_svg(each['calibration'])}"
        f"<figcaption class='note'>calibration, {html.escape(each_name)}</figcaption></figure>"
        for each_name, each in sets.items()
    )
    facts = {
        "layer": report["layer"], "threshold": f"{report['threshold']:.4g}", "tokens": report["tokens"],
        "score of a text": f"the {report['pool']} of its tokens",
        **{f"examples {name}": f"{each['examples']['positive']} + {each['examples']['negative']}"
           for name, each in sets.items()},
    }  # fmt: skip
    notes = page.notes([*report["warnings"], *NOTES])
    body = page.table(header, rows) + curves + page.facts(facts) + notes
    return page.page(f"Probe: {name}", body, "what steer probe test --json prints")


def calibration_svg(curve: Sequence[Mapping[str, float]]) -> str:
    """A calibration curve as SVG: the share of positives over the probability, the diagonal for comparison."""
    size, left, top = 200, 40, 10

    def x(value: float) -> float:
        return left + size * value

    def y(value: float) -> float:
        return top + size * (1 - value)

    most = max((each["examples"] for each in curve), default=1)
    points = " ".join(f"{x(each['probability']):.1f},{y(each['positive']):.1f}" for each in curve)
    dots = "".join(
        f"<circle cx='{x(each['probability']):.1f}' cy='{y(each['positive']):.1f}' "
        f"r='{2 + 4 * (each['examples'] / most) ** 0.5:.1f}' fill='#1f77b4'>"
        f"<title>{each['examples']:.0f} examples</title></circle>"
        for each in curve
    )
    ticks = "".join(
        f"<text x='{x(t):.0f}' y='{top + size + 16}' text-anchor='middle'>{t:g}</text>"
        f"<text x='{left - 6}' y='{y(t) + 4:.0f}' text-anchor='end'>{t:g}</text>"
        for t in (0, 0.5, 1)
    )
    return (
        f"<svg viewBox='0 0 {left + size + 20} {top + size + 40}' width='{left + size + 20}' font-size='12' "
        f"font-family='sans-serif' fill='#444'>"
        f"<rect x='{left}' y='{top}' width='{size}' height='{size}' fill='none' stroke='#ccc'/>"
        f"<line x1='{x(0)}' y1='{y(0)}' x2='{x(1)}' y2='{y(1)}' stroke='#aaa' stroke-dasharray='4'/>"
        f"<polyline points='{points}' fill='none' stroke='#1f77b4' stroke-width='1.5'/>{dots}{ticks}"
        f"<text x='{x(0.5)}' y='{top + size + 34}' text-anchor='middle'>probability</text>"
        f"<text transform='rotate(-90 10 {y(0.5)})' x='10' y='{y(0.5)}' text-anchor='middle'>share of positives</text>"
        "</svg>"
    )
