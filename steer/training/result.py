"""The output of a training bake: a complete model, an adapter, or a task vector; the merge engine rounds it once."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from merges import api
from merges.inputs.sources import Source
from merges.outputs.companions import Companion, write_all
from merges.recipes.plan import plan
from merges.recipes.recipe import Part, Recipe
from steer.folding.model_folder import write_model
from steer.folding.pending import PendingModel
from steer.training import student
from vectors.errors import UsageError
from vectors.events import OnEvent, ignore
from vectors.storage.folders import require_free_output
from vectors.taskwriter import require_vector_path


def require_output(kind: str, out: Path, needed: int, *, full: bool) -> None:
    """Check before any work that the output can be written. Raises UsageError, OutputError."""
    if kind == "lora" and full:
        raise UsageError(
            "all weights are trained, so there is no adapter to write",
            "use --as model or --as vector, or leave out --full",
        )
    if kind == "vector":
        require_vector_path(out, 1)
    else:
        require_free_output(out, needed if kind == "model" else 0)


def save_trained(trained: Any, folder: Path, base: Source, *, full: bool) -> Path:
    """Save a student as something that can be merged, an adapter or a model in float32; returns its folder."""
    target = folder / "trained"
    shutil.rmtree(target, ignore_errors=True)
    if full:
        trained.save_pretrained(target)
    else:
        student.save_adapter(trained, target, name_of(base))
    return target


def name_of(base: Source) -> str:
    """The base as an adapter names it: the model's name, or else the last part of its path; never a whole path."""
    return base.model.name if base.model is not None and base.model.name else Path(base.reference).name


def write(
    kind: str, saved: Path, base: Source, out: Path, *, threads: int | None, on_event: OnEvent = ignore
) -> dict[str, str]:
    """Write to `out` what `save_trained` saved; returns the digest of each file."""
    if kind == "lora":
        return write_all({name: Companion(saved, name) for name in sorted(os.listdir(saved))}, out)
    return write_sum(kind, (Part(str(saved), "bake", {"weight": 1.0}),), base, out, threads=threads, on_event=on_event)


def write_sum(
    kind: str, parts: tuple[Part, ...], base: Source, out: Path, *, threads: int | None, on_event: OnEvent = ignore
) -> dict[str, str]:
    """Write the base and the weighted sum of parts, or the sum as a vector; returns the digest of each file."""
    recipe = Recipe("task_arithmetic", parts, base.reference)
    if kind == "vector":
        outputs: dict[str, str] = api.merge(replace(recipe, as_="vector"), out, threads=threads, on_event=on_event)[
            "outputs"
        ]
        return outputs
    planned = plan(recipe, threads=threads, on_event=on_event)
    with planned.pool:
        pending = PendingModel({job.name: job for job in planned.jobs}, base.config, planned.pool)
        return write_model(pending, base, out, on_event=on_event)
