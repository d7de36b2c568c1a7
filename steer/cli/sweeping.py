"""The end of `steer sweep` and `steer extract --sweep`: the vector is written, and the sweep is printed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cli import output
from steer.cli.output import out
from vectors.documents import json_text
from vectors.errors import OutputError, SteerError, collecting, raise_together
from vectors.storage import runs
from vectors.storage.files import require_distinct, require_writable

if TYPE_CHECKING:
    from steer.evaluation.sweeping.record import Result

VERDICTS = {
    "moves": "moves the test items", "does not move": "does not move the test items",
    "moves the other way": "moves the test items the other way",
}  # fmt: skip


def require_outputs(
    target: Path, folder: Path, force: bool, *, swept: Path | None, inputs: Mapping[str, Path | None]
) -> None:
    """Refuse what a sweep would overwrite, before any work. Raises OutputError with all problems.

    Without `force` these are a file at `target`, but for the vector `swept` itself and for what an earlier sweep in
    `folder` wrote there, and a report of another command in `folder`.
    """
    errors: list[SteerError] = []
    with collecting(errors):
        require_writable(target)
    with collecting(errors):
        require_distinct(target, inputs)
    with collecting(errors):
        if not (swept is not None and target.exists() and target.samefile(swept)) and not _wrote(folder, target):
            output.require_absent(target, force)
    with collecting(errors):
        require_own_folder(folder, force)
    raise_together(errors)


def require_own_folder(folder: Path, force: bool, other: str = "--report DIR") -> None:
    """Refuse a report's folder that is a file, or without `force` that of another command. Raises OutputError.

    `other` is the option that names another folder.
    """
    from steer.evaluation.sweeping import cells, record

    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError(f"{folder}, where the report belongs, is no folder", f"name another one: {other}")
    command = _value(folder / runs.RECORD).get("command")
    others = [name for name in (runs.RECORD, record.REPORT, record.PAGE) if (folder / name).is_file()]
    if force or command == "sweep" or not others or (command is None and (folder / cells.FOLDER).is_dir()):
        return
    whose = f"`steer {command}`" if isinstance(command, str) else "no sweep"
    problem = f"{folder} holds {', '.join(others)} of {whose}"
    raise OutputError(problem, f"name another folder: {other}; or replace them: --force")


def _wrote(folder: Path, target: Path) -> bool:
    """Whether the sweep of a report's folder wrote this vector: it recommends by the run that is recorded there."""
    from steer.evaluation.sweeping.record import REPORT
    from vectors.steering import SteeringVector

    run = _value(folder / REPORT).get("digest")
    if run is None or not target.is_file():
        return False
    try:
        recommended = SteeringVector.load(target).metadata.get("recommended") or {}
    except SteerError:
        return False
    return bool(recommended.get("run") == run)


def _value(path: Path) -> dict[str, Any]:
    """The JSON object of a file; an empty one where there is none that can be read."""
    try:
        value = json_text.parse(json_text.read_bounded(path, json_text.LARGEST))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


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
        without = result.report.get("no_learning_curve")
        if written:  # a vector that was extracted in the same go, whose reason holds the sweep's
            begin = result.vector.metadata["recommended"]
            out.line(f"\nnothing is recommended; to begin with: strength {begin['strength']:g}: {begin['reason']}")
            out.line(f"wrote {target}  {written}")
        else:
            out.line(f"\nnothing is recommended: {result.report['nothing_recommended']}")
            out.line(f"nothing was written to {target}")
        if without:
            out.line(without)
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
