"""The report of a paired experiment as one page: verdicts, differences with intervals, votes, answers side by side."""

from __future__ import annotations

import html as escaping
from collections.abc import Mapping
from typing import Any

from steer.reports import page

Table = tuple[list[str], list[list[str]]]
WIDTH, LEFT, ROW = 760, 230, 26
COLOURS = {"better": "#1a7f37", "worse": "#b42318"}


def html(report: Mapping[str, Any], record: str) -> str:
    """The page; `record` names the files with everything in numbers."""
    header, rows = arm_rows(report)
    body = [*map(_sentence, sentences(report)), page.table(header, rows)]
    body += ["<h2>Differences from the control</h2>", *(_forest(each, report) for each in report["measures"])]
    body.append(page.table(*difference_rows(report)))
    for title, (head, rows) in vote_tables(report).items():
        body += [f"<h2>{title}</h2>", page.table(head, rows)]
    if report["examples"]:
        listed = [(each["prompt"], each["answers"]) for each in report["examples"]]
        body += ["<h2>Answers</h2>", page.side_by_side(listed)]
    settings = report["settings"]
    body.append("<h2>How it was measured</h2>")
    body.append(page.facts({
        **{f"arm {arm['name']}": f"{arm['does']}  ({arm['digest'][:19]})" for arm in report["arms"]},
        "model": report["model"],
        "answers": f"{report['prompts']} prompts, {report['samples']} of each arm to each, at most "
        f"{settings['max_tokens']} tokens, temperature {settings['temperature']:g}, seed {settings['seed']}",
        "engine": report["engine"],
        "experiment": report["digest"],
    }))  # fmt: skip
    body.append(page.notes(report["notes"]))
    return page.page(f"Paired experiment: {report['experiment']}", "".join(body), record)


def sentences(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(verdict, sentence) for every arm beside the control."""
    found = []
    for each in report["verdicts"]:
        difference = _difference(report, each["metric"], each["arm"])
        word = "no verdict" if each["verdict"] in ("too few prompts", "cut off") else each["verdict"]
        figures = "" if difference is None else f" differs by {difference['mean']:+.3g} ({_interval(difference)})"
        found.append((each["verdict"], f"{each['arm']}: {word}. {each['metric']}{figures}; {each['reason']}."))
    return found


def arm_rows(report: Mapping[str, Any]) -> Table:
    """The mean of every measure under every arm."""
    measures = report["measures"]
    return ["arm", *(each["name"] for each in measures)], [
        [arm["name"], *(page.number(each["arms"][arm["name"]]["mean"], ".3g") for each in measures)]
        for arm in report["arms"]
    ]


def difference_rows(report: Mapping[str, Any]) -> Table:
    """The paired difference of every arm from the control, of every measure."""
    header = ["measure", "arm", "difference", f"{report['confidence']:.1%} interval", "p", "missing"]
    rows = []
    for each in report["measures"]:
        for name, arm in each["arms"].items():
            gain = arm["difference"]
            if gain is not None:
                label = f"{each['name']}{' (decides)' if each['main'] else ''}"
                rows.append([label, name, f"{gain['mean']:+.3g}", _interval(gain), f"{gain['p']:.2g}",
                             str(arm["missing"])])  # fmt: skip
    return header, rows


def vote_tables(report: Mapping[str, Any]) -> dict[str, Table]:
    """The tables of votes, by title; none without votes."""
    votes = report["votes"]
    if votes is None:
        return {}
    level = f"{votes['confidence']['pairs']:.1%} interval"
    header = ["arms", "second preferred", level, "second won", "first won", "ties",
              "abstained", "missing", "preferred"]  # fmt: skip
    rows = [
        [
            f"{pair['second']} against {pair['first']}", "-" if pair["rate"] is None else f"{pair['rate']:.0%}",
            page.interval(pair["low"], pair["high"], ".0%"), str(pair["second_won"]), str(pair["first_won"]),
            str(pair["ties"]), str(pair["abstained"]), str(pair["missing"]), pair["verdict"],
        ]
        for pair in votes["pairs"]
    ]  # fmt: skip
    tables: dict[str, Table] = {"Blind votes": (header, rows)}
    if votes["strengths"]:
        tables["Strengths (Bradley and Terry)"] = (
            ["arm", "strength against the control", f"{votes['confidence']['strengths']:.1%} interval"],
            [[each["arm"], f"{each['strength']:+.2f}", f"{each['low']:+.2f} to {each['high']:+.2f}"]
             for each in votes["strengths"]],
        )  # fmt: skip
    return tables


def _sentence(verdict: tuple[str, str]) -> str:
    word, text = verdict
    return f"<p style='color:{COLOURS.get(word, '#444')}'>{escaping.escape(text)}</p>"


def _difference(report: Mapping[str, Any], metric: str, arm: str) -> Mapping[str, Any] | None:
    for each in report["measures"]:
        if each["name"] == metric:
            found: Mapping[str, Any] | None = each["arms"][arm]["difference"]
            return found
    return None


def _forest(measure: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The differences of one measure as points with intervals about zero, as SVG; nothing without an interval."""
    drawn = [
        (name, arm["difference"]) for name, arm in measure["arms"].items()
        if arm["difference"] is not None and arm["difference"]["low"] is not None
    ]  # fmt: skip
    if not drawn:
        return ""
    ends = [0.0, *(gain[key] for _, gain in drawn for key in ("low", "high"))]
    low, high = min(ends), max(ends)
    reach = (high - low) or 1.0
    low, high = low - 0.05 * reach, high + 0.05 * reach

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - 20)

    height = 44 + ROW * len(drawn)
    parts = [f"<line x1='{x(0):.1f}' x2='{x(0):.1f}' y1='8' y2='{height - 30}' stroke='#888' stroke-dasharray='4 4'/>"]
    for row, (name, gain) in enumerate(drawn):
        y = 20 + ROW * row
        parts.append(
            f"<text x='{LEFT - 12}' y='{y + 4}' text-anchor='end'>{escaping.escape(_cut(name))}</text>"
            f"<line x1='{x(gain['low']):.1f}' x2='{x(gain['high']):.1f}' y1='{y}' y2='{y}' stroke='#27c' "
            f"stroke-width='3'/><circle cx='{x(gain['mean']):.1f}' cy='{y}' r='5' fill='#27c'>"
            f"<title>{escaping.escape(name)}: {gain['mean']:+.3g} ({_interval(gain)})</title></circle>"
        )
    for value, anchor in ((low, "start"), (0.0, "middle"), (high, "end")):
        if value == 0 or abs(x(value) - x(0)) > 60:
            parts.append(f"<text x='{x(value):.1f}' y='{height - 12}' text-anchor='{anchor}'>{value:.3g}</text>")
    title = f"{measure['name']} ({measure['unit']}){', which decides' if measure['main'] else ''}"
    return (
        f"<h3 style='font-size:1rem'>{escaping.escape(title)}</h3>"
        f"<svg viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}' role='img' "
        f"aria-label='{escaping.escape(title, quote=True)}' font-size='13' font-family='system-ui,sans-serif'>"
        f"{''.join(parts)}</svg>"
    )


def _cut(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"


def _interval(gain: Mapping[str, Any]) -> str:
    return page.interval(gain["low"], gain["high"], "+.3g")
