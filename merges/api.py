"""The operations on weights as functions, which the commands call: apply, diff, merge, verify."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merges.inputs import bases
from merges.outputs import model_folder, summary
from merges.outputs.difference import diff
from merges.outputs.vector_file import write_vector
from merges.outputs.verification import verify
from merges.recipes import expression
from merges.recipes.layout import LARGEST
from merges.recipes.plan import MEMORY, plan
from merges.recipes.recipe import Part, Recipe
from vectors.errors import SteerError, collecting, raise_together
from vectors.events import OnEvent, ignore
from vectors.storage.folders import require_free_output

__all__ = ["apply", "diff", "merge", "verify"]


def merge(
    recipe: Recipe, out: str | Path, *, memory: int = MEMORY, threads: int | None = None, shard: int = LARGEST,
    device: str = "cpu", recorded: Mapping[str, str] | None = None, on_event: OnEvent = ignore,
) -> dict[str, Any]:  # fmt: skip
    """Merge by a recipe: write a model folder to `out`, or a task vector where the recipe has `as: vector`.

    `memory` (beyond mapped files) and `shard` (the largest output file) are in bytes; `device` is cpu, cuda or cuda:N.
    `recorded` are the references that the record and the card have for those of the recipe, where these are passing.
    `on_event` receives notes about the inputs, then the progress in bytes. Returns the record with all digests, and a
    `summary` of the inputs (merges/outputs/summary.py). Raises UsageError, ModelError and OutputError before any work;
    ArtifactError for values that are not finite.
    """
    target = Path(out)
    errors: list[SteerError] = []
    if recipe.as_ != "vector":
        with collecting(errors):
            require_free_output(target)
    with collecting(errors):
        planned = plan(recipe, memory=memory, threads=threads, shard=shard, device=device, on_event=on_event)
    raise_together(errors)
    if recorded:
        parts = tuple(replace(part, model=recorded.get(part.model, part.model)) for part in planned.recipe.parts)
        planned = replace(planned, recipe=replace(planned.recipe, parts=parts))
    with planned.pool:
        if recipe.as_ == "vector":
            return write_vector(planned, target, shard, on_event=on_event)
        record = model_folder.write_model(planned, target, on_event=on_event)
        if planned.base is not None:
            bases.remember(planned.base.identity, planned.base.path)
        return record | {"summary": summary.summarize(planned, target)}


def apply(
    base: str, what: str, out: str | Path, *, vectors: Mapping[str, str | Path] | None = None, dtype: str = "auto",
    memory: int = MEMORY, threads: int | None = None, shard: int = LARGEST, device: str = "cpu",
    on_event: OnEvent = ignore,
) -> dict[str, Any]:  # fmt: skip
    """Write a complete model folder: the base plus `what`, a task vector, an adapter, or an expression over them.

    `vectors` are the files of the names in the expression; other names are NAME.safetensors in the current folder.
    `dtype` is the result's: auto (the base's), float32, bfloat16 or float16. A single exact vector restores the
    fine-tuned model to the bit. Returns the record with all digests. Raises ExpressionError, and as `merge` does.
    """
    errors: list[SteerError] = []
    recipe = Recipe("task_arithmetic", (Part(base, "base"),), base, dtype=dtype)
    with collecting(errors):
        recipe = replace(expression.read(what, vectors or {}, base), dtype=dtype)
    if errors:  # the base and the options are checked nevertheless, with the base in place of the vectors
        with collecting(errors):
            require_free_output(Path(out))
        with collecting(errors):
            plan(recipe, memory=memory, threads=threads, shard=shard, device=device)
    raise_together(errors)
    return merge(recipe, out, memory=memory, threads=threads, shard=shard, device=device, on_event=on_event)
