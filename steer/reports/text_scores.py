"""What scorers and tasks say of the arms, as tables of the page and of the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steer.reports import page

Table = tuple[list[str], list[list[str]]]


def section(report: Mapping[str, Any]) -> str:
    """The part of the page about them as HTML; empty where nothing was scored."""
    tables = "".join(page.table(header, rows, header[1:2]) for header, rows in score_tables(report))
    return f"<h2>Scores of the answers, and tasks</h2>{tables}{page.notes(validity(report))}" if tables else ""


def score_tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of scorers, of preferences and of tasks, those that have rows; two columns of names first."""
    tables = [_rates(report["scores"]), _preferences(report["scores"]), _tasks(report["tasks"])]
    return [(header, rows) for header, rows in tables if rows]


def validity(report: Mapping[str, Any]) -> list[str]:
    """How far each scorer agrees with people, its confusion matrix, and what is missing, as sentences."""
    lines = []
    for scorer in report["scores"]:
        lines.append(scorer["validity"])
        if scorer["agreement"]:
            lines.append(_confusion(scorer["agreement"]))
        missing: dict[str, int] = {}
        for arm in scorer["arms"].values():
            for reason, count in arm["rate"]["missing"].items():
                missing[reason] = missing.get(reason, 0) + count
        total = sum(len(arm["scores"]) for arm in scorer["arms"].values())
        lines += [f"{scorer['name']}: {count} of {total} scores are missing: {why}" for why, count in missing.items()]
    return lines


def _confusion(agreement: Mapping[str, Any]) -> str:
    names = agreement["categories"]
    cells = "; ".join(
        f"label {label}: {', '.join(f'{name} {count}' for name, count in zip(names, row, strict=True))}"
        for label, row in zip(names, agreement["matrix"], strict=True)
    )
    missing = f"; {agreement['missing']} without a score" if agreement["missing"] else ""
    return f"confusion matrix, what the scorer gives to texts of each label: {cells}{missing}"


def _rates(scores: Sequence[Mapping[str, Any]]) -> Table:
    header = ["scorer", "arm", "mean", "95 % interval", "less the base", "95 % interval", "scored", "missing"]
    rows = []
    for scorer in scores:
        for name, arm in scorer["arms"].items():
            rate, gain = arm["rate"], arm["difference"]
            rows.append(
                [
                    f"{scorer['name']} ({scorer['unit']})",
                    name,
                    page.number(rate["mean"]),
                    page.interval(*(rate["interval"] or (None, None))),
                    page.number(gain and gain["mean"], "+.3f"),
                    page.interval(gain and gain["low"], gain and gain["high"], "+.3f"),
                    str(rate["scored"]),
                    str(sum(rate["missing"].values())),
                ]
            )
    return header, rows


def _preferences(scores: Sequence[Mapping[str, Any]]) -> Table:
    header = ["judge", "arm", "preferred to the base", "95 % interval", "won", "lost", "tied", "abstained", "missing"]
    rows = []
    for scorer in scores:
        for name, arm in scorer["arms"].items():
            pairs = arm["preferred"]
            if pairs:
                counts = [pairs["wins"], pairs["losses"], pairs["ties"], pairs["abstained"]]
                rows.append(
                    [
                        scorer["name"], name, page.number(pairs["rate"]),
                        page.interval(*(pairs["interval"] or (None, None))),
                        *map(str, counts), str(sum(pairs["missing"].values())),
                    ]
                )  # fmt: skip
    return header, rows


def _tasks(tasks: Sequence[Mapping[str, Any]]) -> Table:
    header = ["task", "arm", "metric", "value", "standard error", "less the base", "95 % interval", "documents"]
    rows = []
    for task in tasks:
        gain = task["difference"]
        rows.append(
            [
                task["task"], task["arm"], task["metric"], page.number(task["value"]), page.number(task["error"]),
                page.number(gain and gain["mean"], "+.3f"),
                page.interval(gain and gain["low"], gain and gain["high"], "+.3f"),
                str(task["documents"]),
            ]
        )  # fmt: skip
    return header, rows
