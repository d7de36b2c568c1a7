"""`steer.evaluate`: what the command `steer eval` does, as a function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer.evaluation import evaluation as core
from steer.evaluation.evaluation import Evaluation
from steer.evaluation.export_files import write_exports
from steer.evaluation.exports import references
from steer.evaluation.inputs import read_inputs
from steer.evaluation.measuring.engine import Through
from steer.evaluation.report import record, report
from steer.evaluation.request import Request
from steer.reports import evaluation as page
from vectors.errors import SteerError, UsageError, collecting, guess, raise_together
from vectors.events import OnEvent, ignore
from vectors.registry.options import problems_of, several, without_problems
from vectors.storage.files import digest_bytes, readable_json, write_atomically
from vectors.storage.folders import new_folder


def evaluate(*subjects: str, through: Through | None = None, on_event: OnEvent = ignore, **options: Any) -> Evaluation:
    """Measure whether subjects show a behaviour, against controls, and what that costs elsewhere.

    A subject is a vector's file, an expression over `vectors`, "prompt:TEXT", a model's or adapter's folder, or a task
    vector; `options` are the fields of `steer.evaluation.request.Request`, such as `suite`, `pos`, `neg`, `prompt`,
    `items`, `out`. Results do not depend on the order of items. Raises SteerError with all problems of the inputs
    before a model is loaded; TypeError for an unknown option.
    """
    known = [name for name in Request.__dataclass_fields__ if name != "subjects"]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"evaluate() has no option {unknown[0]!r}{guess(unknown[0], known)}")
    paths = ("suite", "pos", "neg", "pairs", "choices", "prompt_file", "neutral", "donor", "out", "extraction_pos",
             "extraction_neg", "extraction_pairs", "labels", "judge_key_file")  # fmt: skip
    for name in paths:
        if isinstance(options.get(name), str):
            options[name] = Path(options[name])
    return evaluate_request(
        Request(subjects=tuple(subjects), **several(Request, options)), through=through, on_event=on_event
    )


def evaluate_request(request: Request, *, through: Through | None = None, on_event: OnEvent = ignore) -> Evaluation:
    """`evaluate` for a request; with `out` it writes the folder. Raises SteerError.

    The engine of a request is brought along by the caller: `steer.serving.offline.arms.through_vllm` for vLLM.
    """
    errors: list[SteerError] = []
    problems = problems_of(request)
    if problems:
        errors.append(UsageError(problems, "see steer eval --help"))
    if request.engine == "vllm" and through is None:
        errors.append(UsageError(
            "engine='vllm' needs the engine itself",
            "from steer.serving.offline.arms import through_vllm; evaluate(…, engine='vllm', through=through_vllm)",
        ))  # fmt: skip
    require_right(request, errors)
    evaluation = core.run(request, through=through, on_event=on_event)
    if request.out is not None:
        write(evaluation, request.out)
    return evaluation


def require_right(request: Request, errors: list[SteerError]) -> None:
    """Raise the errors that were found in the options of a request, if any, with those of what it names: files,
    subjects, scorers, tasks. Does nothing where there are none, since `evaluate_request` reads these itself."""
    if errors:
        with collecting(errors):
            read_inputs(without_problems(request))
    raise_together(errors)


def write(evaluation: Evaluation, out: Path) -> dict[str, str]:
    """Write run.json, report.json, report.html and the pictures into a new folder; returns the files' digests.

    Beside the file of every vector that was a subject by itself, NAME.evaluations.json binds the vector's digest to
    that of the report. Raises OutputError.
    """
    value = report(evaluation)
    files = {"report.json": readable_json(value)}
    pictures = page.pictures(value)
    files |= {f"{name}.svg": content.encode() for name, content in pictures.items()}
    files["report.html"] = page.html(value, pictures, "run.json").encode()
    digests = {name: digest_bytes(content) for name, content in files.items()}
    with new_folder(out) as folder:
        for name, content in files.items():
            write_atomically(folder / name, content)
        digests |= write_exports(evaluation, folder)
        record(evaluation, value, digests).write(folder)
    for result in evaluation.subjects:
        subject = result.plan.subject
        if subject.name in evaluation.request.subject_names.values():
            continue  # its vectors are blobs of a store, which keeps its evaluations
        if len(subject.files) == 1 and len(subject.arm.vectors) == 1:
            (file,) = subject.files.values()
            digest = next(iter(subject.arm.vectors.values())).digest
            references.add(file, {
                "vector": digest, "report": digests["report.json"], "folder": str(out),
                "expression": str(subject.arm.composition), "outcome": result.outcome, "sentence": result.sentence,
                "suite": dict(evaluation.inputs.suite.digests),
            })  # fmt: skip
    return digests
