"""What can be done with weights, as functions: apply, diff, merge, verify; commands call them and print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merges.inputs import bases
from merges.outputs import model_folder
from merges.outputs.difference import diff
from merges.outputs.vector_file import write_vector
from merges.outputs.verification import verify
from merges.recipes import expression
from merges.recipes.layout import LARGEST
from merges.recipes.plan import MEMORY, plan
from merges.recipes.recipe import Recipe
from vectors.events import OnEvent, ignore

__all__ = ["apply", "diff", "merge", "verify"]


def merge(
    recipe: Recipe, out: str | Path, *, memory: int = MEMORY, threads: int | None = None, shard: int = LARGEST,
    device: str = "cpu", on_event: OnEvent = ignore,
) -> dict[str, Any]:  # fmt: skip
    """Do what a recipe says: a model folder at `out`, or a task vector where the recipe says `as: vector`.

    Returns the record with all digests. `on_event` is told what is worth knowing about the inputs before a weight is
    read, and then the bytes that are done. Raises UsageError, ModelError and OutputError before any work; ArtifactError
    for values that can't be merged.
    """
    target = Path(out)
    planned = plan(recipe, memory=memory, threads=threads, shard=shard, device=device, on_event=on_event)
    with planned.pool:
        if recipe.as_ == "vector":
            return write_vector(planned, target, shard, on_event=on_event)
        record = model_folder.write_model(planned, target, on_event=on_event)
        if planned.base is not None:
            bases.remember(planned.base.identity, planned.base.path)
        return record


def apply(
    base: str, what: str, out: str | Path, *, vectors: Mapping[str, str | Path] | None = None, dtype: str = "auto",
    memory: int = MEMORY, threads: int | None = None, shard: int = LARGEST, device: str = "cpu",
    on_event: OnEvent = ignore,
) -> dict[str, Any]:  # fmt: skip
    """Write a complete model folder: the base plus a task vector, an adapter, or an expression over them.

    `vectors` are the files of the expression's names; a name without one is NAME.safetensors in the current folder.
    `dtype` is the result's: auto (the base's), float32, bfloat16 or float16. An exact vector alone restores the
    fine-tuned model to the bit. Returns the record with all digests; raises ExpressionError, and what `merge` raises.
    """
    recipe = replace(expression.read(what, vectors or {}, base), dtype=dtype)
    return merge(recipe, out, memory=memory, threads=threads, shard=shard, device=device, on_event=on_event)
