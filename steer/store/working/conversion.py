"""A model's folder or an adapter's as a part: the task vector that makes the base into it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steer.store.layout import Store
from vectors.errors import SteerError, UsageError
from vectors.events import OnEvent, ignore
from vectors.storage.locks import temporary_folder

ONE_FILE = 2**60  # bytes: a part is one blob, however large


@contextmanager
def as_task_vector(
    store: Store, folder: Path, base: str, fields: Mapping[str, Any], *, on_event: OnEvent = ignore
) -> Iterator[Path]:
    """A task vector's file, until the context ends, that is the difference of a folder from the base.

    `folder` is a model's (fine-tuned, trained, folded, merged) or a PEFT adapter's. The difference is exact: base plus
    vector is the model to the bit, and for an adapter what `steer merge` makes of it. The same weights give the same
    bytes. Raises UsageError and ModelError before a weight is read where it can't be made.
    """
    from merges import api
    from merges.inputs import locations
    from merges.recipes.recipe import Part, Recipe

    reference = str(folder.absolute())
    problems = [f"{folder} changes the weights, so it has no {key}" for key in fields if key != "strength"]
    if problems:
        raise UsageError(problems, f"give a strength alone: steer add {folder} --strength 0.5")
    adapter = locations.adapter(reference) is not None
    if not adapter and not os.path.isfile(folder / "config.json"):
        raise UsageError(
            f"{folder} is neither a model's folder (config.json) nor an adapter's (adapter_config.json)",
            "add one of these, or the file of a vector",
        )
    with temporary_folder(store.root / "conversion") as work:
        file = work / "vector.safetensors"
        try:
            if adapter:
                # Its name is fixed: the same adapter under another name has the same bytes.
                recipe = Recipe("task_arithmetic", (Part(reference, "adapter"),), base, as_="vector")
                api.merge(recipe, file, shard=ONE_FILE, on_event=on_event)
            else:
                api.diff(base, reference, file, shard=ONE_FILE, on_event=on_event)
        except SteerError as error:
            why = [f"{folder} can't be a part over the base {base}: {problem}" for problem in error.problems]
            raise type(error)(why, error.hint) from error
        yield file
