"""The difference of two trainings, which the mode `contrast` writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from merges.recipes.recipe import Part
from probes.evaluation_set import contrast_of, counts, evaluate, evaluation_set, retention
from probes.models.loading import load, open_model
from steer.folding import model_folder
from steer.reports import training as training_report
from steer.training import result, work
from steer.training.bake import bake, job_of
from steer.training.mode import Mode
from steer.training.requests import TrainingRequest
from vectors.events import Event, OnEvent, ignore
from vectors.storage.folders import new_folder
from vectors.storage.runs import has_record, read_json, report_of


class Half(NamedTuple):
    """One of the two trainings, and the weight of its result in the difference."""

    name: str
    request: TrainingRequest
    mode: Mode
    weight: float


def train_difference(
    request: TrainingRequest, trait: Half, opposite: Half, *, on_event: OnEvent = ignore
) -> dict[str, Any]:
    """Train both, and write the difference; returns a report of it and of both trainings.

    A run that was killed is resumed, and a finished half is not trained again. Raises what `bake` raises.
    """
    halves = (trait, opposite)
    jobs = {half.name: job_of(request, half.mode) for half in halves}
    job = jobs["for"]
    identity = {name: each.identity for name, each in jobs.items()} | {"weight": 1.0}
    with work.work_folder(request.out, identity) as folder:
        reports = {half.name: _trained(half, folder, on_event) for half in halves}
        parts = tuple(Part(str(_vector(folder, half)), half.name, {"weight": half.weight}) for half in halves)
        facts = {
            "schema": 1, "mode": "contrast",
            "behaviour": f"{trait.mode.behaviour}, less {opposite.mode.behaviour}", "base": job.base,
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


def _evaluated(request: TrainingRequest, folder: Path) -> dict[str, Any]:
    """Evaluation of the base and of the result: on neutral text, and on the trait's examples if there are any."""
    loaded = load(open_model(request.model), request.device, request.dtype)
    examples = contrast_of(loaded, request.pos, request.neg)
    evaluated = evaluation_set(loaded, examples, seed=request.settings.seed)
    base = evaluate(loaded.model, evaluated)
    del loaded
    baked = evaluate(load(folder, request.device, request.dtype).model, evaluated)
    return {
        "models": {"base": base, "baked": baked},
        "measured_on": counts(evaluated),
        "dose": {},
        "retention": retention(base, baked),
    }
