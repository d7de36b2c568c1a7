"""The contrastive difference: train on a trait and on its opposite and subtract, so that shared form and topic cancel.

theta+ - theta- (Fierro and Roger 2025, arXiv:2511.05408) is a task vector, which `steer merge` can combine further.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from merges.recipes.recipe import Part
from probes.evaluation_set import contrast_of, evaluate, evaluation_set, retention
from probes.models.loading import find, load
from steer.folding import model_folder
from steer.reports import training as training_report
from steer.training import result, work
from steer.training.bake import bake, check
from steer.training.distributed import processes
from steer.training.mode import Mode
from steer.training.modes import imitate
from steer.training.requests import ContrastRequest, ImitateRequest
from vectors.errors import SteerError, UsageError, kept, raise_together
from vectors.events import Event, OnEvent, ignore
from vectors.storage.folders import new_folder
from vectors.storage.runs import has_record, read_json, report_of

REQUEST = ContrastRequest


class Half(NamedTuple):
    """One of the two trainings, and the weight of its result in the difference."""

    name: str
    request: ImitateRequest
    mode: Mode
    weight: float


def run(request: ContrastRequest, *, weight: float = 1.0, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Train on both files, and write `weight` times the difference; returns a report of it and of both trainings.

    A run that was killed is resumed, and a finished half is not trained again. Raises UsageError for an adapter, since
    the difference of two has twice their rank; and what `bake` raises.
    """
    if processes.count() > 1 or request.settings.sharded:
        raise UsageError("--against trains in one process", "start it without a launcher, and without --fsdp")
    if request.as_ == "lora":
        raise UsageError("the difference of two adapters has twice their rank", "use --as vector or --as model")
    halves = _halves(request, weight)
    jobs = {half.name: check(request, half.mode) for half in halves}
    job = jobs["for"]
    identity = {name: each.identity for name, each in jobs.items()} | {"weight": weight}
    with work.work_folder(request.out, identity) as folder:
        reports = {half.name: _trained(half, folder, on_event) for half in halves}
        parts = tuple(Part(str(_vector(folder, half)), half.name, {"weight": half.weight}) for half in halves)
        facts = {
            "schema": 1, "mode": "contrast",
            "behaviour": f"{halves[0].mode.behaviour}, less {halves[1].mode.behaviour}", "base": job.base,
            "as": request.as_, "weights": {half.name: half.weight for half in halves},
            "samples": {name: report["samples"] for name, report in reports.items()},
            "settings": reports["for"]["settings"], "reports": reports,
        }  # fmt: skip
        size = sum(entry.size for entry in job.source.entries.values())
        as_model = request.as_ == "model"
        # A vector is also evaluated as a model, which is removed afterwards.
        with new_folder(request.out if as_model else folder / "model", size) as target:
            on_event(Event("writing"))
            threads = request.threads
            outputs = result.write_sum("model", parts, job.source, target, threads=threads, on_event=on_event)
            report = {**facts, "outputs": outputs, **_evaluated(request, target)}
            if as_model:
                training_report.write(target, report, reports["for"]["history"])
                model_folder.write_card(target, report, job.source, f"`{report['behaviour']}` baked by contrast.")
        if not as_model:
            shutil.rmtree(folder / "model")
            outputs = result.write_sum("vector", parts, job.source, request.out, threads=threads, on_event=on_event)
            report = {**report, "outputs": outputs}
            training_report.write(request.out, report, reports["for"]["history"])
    return report


def _halves(request: ContrastRequest, weight: float) -> list[Half]:
    """Both trainings. Raises all problems of both files together."""
    errors: list[SteerError] = []
    halves = []
    for name, file, sign in (("for", request.data, 1.0), ("against", request.against, -1.0)):
        if file is None:
            option = "--data" if name == "for" else "--against"
            errors.append(UsageError(f"there is nothing to contrast: no {option}", f"give {option} FILE"))
            continue
        folder = work.path_of(request.out)
        half = request.half(file, folder / f"{name}.safetensors")
        with kept(errors):
            halves.append(Half(name, half, imitate.mode(half), sign * weight))
    if errors and halves:
        with kept(errors):
            check(request, halves[0].mode)
    raise_together(errors)
    return halves


def _vector(folder: Path, half: Half) -> Path:
    return folder / f"{half.name}.safetensors"


def _trained(half: Half, folder: Path, on_event: OnEvent) -> dict[str, Any]:
    """The report of one training, which is run unless an earlier run has finished it."""
    vector = _vector(folder, half)
    if not has_record(vector):  # the record is written last: without it the vector is incomplete
        vector.unlink(missing_ok=True)
        on_event(Event(f"training: {half.mode.behaviour}"))
        bake(half.request, half.mode, on_event=on_event)
    return report_of(read_json(vector)[1])


def _evaluated(request: ContrastRequest, folder: Path) -> dict[str, Any]:
    """Evaluation of the base and of the result: on neutral text, and on the trait's examples if there are any."""
    loaded = load(find(request.model), request.device, request.dtype)
    examples = contrast_of(loaded, request.pos, request.neg)
    evaluated = evaluation_set(loaded, examples, seed=request.settings.seed)
    base = evaluate(loaded.model, evaluated)
    del loaded
    baked = evaluate(load(folder, request.device, request.dtype).model, evaluated)
    return {"models": {"base": base, "baked": baked}, "dose": {}, "retention": retention(base, baked)}
