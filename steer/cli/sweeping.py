"""The end of `steer sweep` and `steer extract --sweep`: the vector is written, and the sweep is printed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from steer.cli import output
from steer.cli.output import out

if TYPE_CHECKING:
    from steer.evaluation.sweeping.record import Result

VERDICTS = {
    "moves": "moves the test items", "does not move": "does not move the test items",
    "moves the other way": "moves the test items the other way",
}  # fmt: skip


def finish(result: Result, target: Path, folder: Path, model: str, *, always: bool = False) -> None:
    """Write the vector if a point was chosen, or `always`, and print the sweep."""
    written = ""
    if always or result.swept.chosen is not None:
        out.say(output.replacing(target))
        written = result.vector.save(target)
    data = {"vector": str(target), "vector_digest": written, "report": str(folder / "report.html"), **result.report}
    out.result(data, lambda: show(result, target, folder, written, model))


def show(result: Result, target: Path, folder: Path, written: str, model: str) -> None:
    """Print the points and the choice."""
    from steer.reports.sweep import COLUMNS, rows

    out.table(list(COLUMNS), rows(result.report["points"]), 1)
    test = result.swept.test
    if result.swept.chosen is None:
        if written:  # a vector that was extracted in the same go, whose reason holds the sweep's
            begin = result.vector.metadata["recommended"]
            out.line(f"\nnothing is recommended; to begin with: strength {begin['strength']:g}: {begin['reason']}")
            out.line(f"wrote {target}  {written}")
        else:
            out.line(f"\nnothing is recommended: {result.report['nothing_recommended']}")
            out.line(f"nothing was written to {target}")
        out.say(f"\nreport: {folder / 'report.html'}")
        return
    recommended = result.report["recommended"]
    steps = ", ".join(
        f"{margin:.3f} at {multiple:g}" for multiple, margin in zip(test["multiples"], test["margins"], strict=True)
    )
    out.line(f"\nrecommended: strength {recommended['strength']:g}: {recommended['reason']}")
    out.line(f"test {result.swept.metric} by multiple of the strength: {steps}")
    if test["too_few"]:
        out.line(f"verdict: none, since {test['too_few']}")
    else:
        out.line(f"verdict: the point {VERDICTS[test['verdict']]}; `steer eval` says if more than control vectors do")
    if result.swept.learning:
        out.line()
        out.table(
            ["examples", "repeats", "effect", "95 % interval"],
            [
                [
                    str(each["examples"]), str(each["repeats"]), f"{each['effect']:+.4f}",
                    "-" if each["repeats"] < 2 else f"{each['low']:+.4f} to {each['high']:+.4f}",
                ]
                for each in result.swept.learning
            ],
        )  # fmt: skip
    out.line(f"wrote {target}  {written}")
    cells = result.swept.cells
    out.say(
        f"\n{cells['measured']} cells measured, {cells['reused']} from before; report: {folder / 'report.html'}\n"
        f'next: steer try {shlex.quote(str(target))}{output.next_model(model)} -p "…"'
    )
