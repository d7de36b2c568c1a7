"""Verification of a finished merge: it is computed again from its record, and every byte is compared."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merges.outputs import card, model_folder
from merges.recipes.document import parse
from merges.recipes.plan import MEMORY, Plan, plan
from vectors.documents.schema import anything, list_of, mapping_of, problems_of, text
from vectors.documents.schema import record as schema_of
from vectors.errors import ArtifactError, SteerError, UsageError, guess
from vectors.events import OnEvent, ignore
from vectors.storage.runs import RECORD, has_record, read_json, record_path

_TEXT = text(longest=10_000)
_RECORD = schema_of(
    {
        "recipe": mapping_of(anything), "plan": _TEXT, "outputs": mapping_of(_TEXT), "shards": list_of(list_of(_TEXT)),
        "inputs": list_of(schema_of({"name": _TEXT, "identity": _TEXT, "files": mapping_of(_TEXT)})),
    }
)  # fmt: skip


def read_record(out: Path) -> dict[str, Any]:
    """The record of a finished merge. Raises ArtifactError."""
    if os.path.isfile(out):
        raise ArtifactError(
            f"{out} is a file; only a model folder has a record to verify it against",
            "name a model folder that `steer merge` wrote",
        )
    if not has_record(out):
        raise ArtifactError(f"{out} has no {RECORD}", "name a folder that `steer merge` wrote")
    path, value = read_json(out)
    command = value.get(
        "command", "bake" if "mode" in value else "merge"
    )  # earlier versions did not record the command
    if command != "merge":
        raise ArtifactError(
            f"{path} is the record of `steer {command}`, not of a merge", "name a folder that `steer merge` wrote"
        )
    record = card.flat_record(value)
    if problems := problems_of(record, _RECORD):
        raise ArtifactError(
            [f"{path} is damaged: {problem}" for problem in problems],
            "the weights can't be verified without it; make the merge again",
        )
    return record


def verify(
    out: str | Path, *, paths: Mapping[str, str | Path] | None = None, memory: int = MEMORY,
    threads: int | None = None, device: str = "cpu", on_event: OnEvent = ignore,
) -> dict[str, Any]:  # fmt: skip
    """Compute a finished merge again from its recipe and compare every byte. Returns the record.

    `paths` are the new paths of inputs that have moved since, by their names in the recipe (`base` for the base).
    Raises UsageError for names that the recipe lacks, and ArtifactError with everything that differs.
    """
    folder = Path(out)
    record = read_record(folder)
    recipe = parse(record["recipe"], str(record_path(folder)))
    references = {part.name: part.model for part in recipe.parts} | ({"base": recipe.base} if recipe.base else {})
    new = {name: str(path) for name, path in (paths or {}).items()}
    if not recipe.base and "base" in new:
        recipe, references = replace(recipe, base=new["base"]), references | {"base": new["base"]}
    unknown = [f"the recipe has no input {name!r}{guess(name, references)}" for name in new if name not in references]
    if unknown:
        raise UsageError(unknown, f"it has {', '.join(references)}")
    recipe = recipe.renamed({references[name]: path for name, path in new.items()})
    try:
        planned = plan(recipe, memory=memory, threads=threads, device=device, on_event=on_event)
    except SteerError as error:
        hint = "verify from the folder in which the merge was made, or give the paths of its inputs: --vector NAME=PATH"
        raise ArtifactError(error.problems, hint) from error
    with planned.pool:
        _lay_out_as_recorded(planned, record["shards"])
        if record["plan"] not in (planned.digest, planned.former_digest):
            changed = [
                f"the input {before['name']} has changed: its digest is {after['identity']}, not {before['identity']}"
                for before, after in zip(record["inputs"], card.inputs(planned), strict=False)
                if before["identity"] != after["identity"]
            ]
            raise ArtifactError(
                changed or [f"the merge {folder} can't be computed again: its recipe or the arithmetic has changed"],
                "verify with the inputs that it was made from",
            )
        problems = model_folder.verify(planned, folder, record, on_event=on_event)
    if problems:
        raise ArtifactError([f"{folder}: {problem}" for problem in problems], "make the merge again")
    return record


def _lay_out_as_recorded(planned: Plan, shards: list[list[str]]) -> None:
    """Distribute the tensors over the shards as recorded, whatever size of a shard was chosen then."""
    by_name = {job.name: job for job in planned.jobs}
    if sorted(by_name) == sorted(name for shard in shards for name in shard):
        planned.shards = [[by_name[name] for name in shard] for shard in shards]
