"""What can be done with weights, as functions: merge, diff, verify. A command parses, calls one of them and prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from merges.inputs import bases
from merges.outputs import model_folder
from merges.outputs.difference import diff
from merges.outputs.vector_file import write_vector
from merges.outputs.verification import verify
from merges.recipes.layout import LARGEST
from merges.recipes.plan import MEMORY, Plan, plan
from merges.recipes.recipe import Recipe

__all__ = ["diff", "merge", "verify"]

Progress = Callable[[int, int], None]


def merge(
    recipe: Recipe, out: str | Path, *, memory: int = MEMORY, threads: int | None = None, shard: int = LARGEST,
    device: str = "cpu", progress: Progress | None = None, planned: Callable[[Plan], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Do what a recipe says: a model folder at `out`, or a task vector where the recipe says `as: vector`.

    Returns the record with all digests. `planned` is called with the plan before a weight is read. Raises UsageError,
    ModelError and OutputError before any work; ArtifactError for values that can't be merged.
    """
    target = Path(out)
    made = plan(recipe, memory=memory, threads=threads, shard=shard, device=device)
    with made.pool:
        if planned:
            planned(made)
        if recipe.as_ == "vector":
            return write_vector(made, target, shard, progress)
        record = model_folder.write_model(made, target, progress)
        if made.base is not None:
            bases.remember(made.base.identity, made.base.path)
        return record
