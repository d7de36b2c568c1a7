"""The contrastive difference: train both signs, subtract; what both learned of form and topic cancels.

theta+ - theta- (Fierro and Roger 2025, arXiv:2511.05408) is a task vector by itself: a result for `steer merge`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from merges.recipes.recipe import Part
from probes.evaluation_set import contrast_of, evaluate, evaluation_set, retention
from probes.models.loading import find, load
from steer.folding import model_folder
from steer.reports import training as report
from steer.training import bake, result, work
from steer.training.bake import Request, Tell
from steer.training.distributed import processes
from steer.training.modes import train
from vectors.errors import SteerError, UsageError, kept, raise_together
from vectors.folders import new_folder


def contrast(request: Request, path: Path, against: Path, *, weight: float = 1.0, tell: Tell) -> dict[str, Any]:
    """Train on `path` and on `against`, and write `weight` times their difference; returns a report of it and of both.

    A killed run goes on: a half that is done is not trained again. Raises UsageError for an adapter, which can't hold a
    difference of two at their rank; and what `bake` raises.
    """
    if processes.count() > 1 or request.settings.sharded:
        raise UsageError("--against trains in one process", "start it without a launcher, and without --fsdp")
    if request.as_ == "lora":
        raise UsageError("the difference of two adapters is no adapter of their rank", "--as vector, or --as model")
    errors: list[SteerError] = []
    halves = []
    for name, file, sign in (("for", path, 1.0), ("against", against, -1.0)):
        with kept(errors):
            halves.append((name, train.imitate(request, file), sign * weight))
    with kept(errors):
        bake.check(request, halves[0][1] if halves else train.imitate(request, path))
    raise_together(errors)
    source, identity = bake.check(request, halves[0][1])
    run = {name: bake.run_of(request, mode, identity) for name, mode, _ in halves} | {"weight": weight}
    work.check(request.out, run)
    with work.working(request.out, run) as place:
        reports, parts = {}, []
        for name, mode, own in halves:
            half, said = place / f"{name}.safetensors", place / f"{name}.report.json"
            if not said.is_file():  # written last: a half without it is not whole
                half.unlink(missing_ok=True)
                tell({"stage": f"training: {mode.behaviour}"})
                bake.bake(replace(request, out=half, as_="vector"), mode, tell=tell)
            reports[name] = json.loads(said.read_text(encoding="utf-8"))
            parts.append(Part(str(half), name, {"weight": own}))
        found: dict[str, Any] = {
            "schema": 1, "mode": "contrast", "behaviour": f"{halves[0][1].behaviour}, less {halves[1][1].behaviour}",
            "base": identity, "as": request.as_, "weights": {part.name: part.options["weight"] for part in parts},
            "samples": {name: own["samples"] for name, own in reports.items()},
            "settings": reports["for"]["settings"], "reports": reports,
        }  # fmt: skip
        size = sum(entry.size for entry in source.entries.values())
        if request.as_ == "model":
            with new_folder(request.out, size) as target:
                found["outputs"] = result.write_sum("model", tuple(parts), source, target, threads=request.threads)
                found.update(_measured(request, target))
                report.write(target, found, reports["for"]["history"])
                model_folder.write_card(target, found, source, f"`{found['behaviour']}` baked by contrast.")
        else:
            with new_folder(place / "model", size) as target:  # to be measured, and removed with the work
                result.write_sum("model", tuple(parts), source, target, threads=request.threads)
                found.update(_measured(request, target))
            shutil.rmtree(place / "model")
            found["outputs"] = result.write_sum("vector", tuple(parts), source, request.out, threads=request.threads)
            report.write(request.out.parent, found, reports["for"]["history"], f"{request.out.stem}.")
    return found


def _measured(request: Request, whole: Path) -> dict[str, Any]:
    """The base and the difference on neutral text, and on the examples of the trait where there are any."""
    loaded = load(find(request.model), request.device, request.dtype)
    measured_on = evaluation_set(loaded, contrast_of(loaded, request.pos, request.neg), seed=request.settings.seed)
    models = {"base": evaluate(loaded.model, measured_on)}
    del loaded
    models["baked"] = evaluate(load(whole, request.device, request.dtype).model, measured_on)
    return {"models": models, "dose": {}, "retention": retention(models["base"], models["baked"])}
