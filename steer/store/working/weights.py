"""A change of the weights as a part: a model's or an adapter's folder becomes a task vector against the base.

So every change of the weights has one form in the store, in one file whose bytes follow from its content.
"""

from __future__ import annotations

from pathlib import Path

from merges import api
from merges.inputs import locations
from merges.recipes.recipe import Part, Recipe
from vectors.errors import UsageError
from vectors.events import OnEvent, ignore
from vectors.task import SHARD

ONE_FILE = 1024 * SHARD  # bytes: a part of a composition is one file


def task_vector_of(target: Path, base: str, out: Path, *, on_event: OnEvent = ignore) -> None:
    """Write the task vector of a folder against `base` to `out`.

    Of a model it restores every bit of the model's weights; of an adapter it is its change of each weight, in float32.
    Raises UsageError for a folder that is neither, ModelError, ArtifactError, OutputError.
    """
    if locations.adapter(str(target)) is not None:
        part = Part(str(target), target.name, {"weight": 1.0})
        recipe = Recipe("task_arithmetic", (part,), base, as_="vector")
        api.merge(recipe, out, shard=ONE_FILE, on_event=on_event)
    elif (target / "config.json").is_file():
        api.diff(base, str(target), out, shard=ONE_FILE, on_event=on_event)
    else:
        raise UsageError(
            f"{target} is a folder without config.json or adapter_config.json",
            "add a model's folder, an adapter's, a steering vector or a task vector",
        )
