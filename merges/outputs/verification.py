"""Whether a finished merge is what its record says: it is computed again, and every byte compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merges.outputs import card, model_folder
from merges.recipes.document import parse
from merges.recipes.plan import MEMORY, Plan, plan
from vectors.errors import ArtifactError, SteerError, UsageError, guess
from vectors.events import OnEvent, ignore
from vectors.runs import RECORD, has_record, read_json, record_path


def read_record(out: Path) -> dict[str, Any]:
    """The record of a finished merge. Raises ArtifactError."""
    if out.is_file():
        raise ArtifactError(
            f"{out} is a file, and has no record to be verified by", "name a model folder that `steer merge` wrote"
        )
    if not has_record(out):
        raise ArtifactError(f"{out} has no {RECORD}", "name a folder that `steer merge` wrote")
    path, value = read_json(out)
    command = value.get("command", "bake" if "mode" in value else "merge")  # earlier versions did not name it
    if command != "merge":
        raise ArtifactError(
            f"{path} is the record of `steer {command}`, not of a merge", "name a folder that `steer merge` wrote"
        )
    try:
        record = card.flat_record(value)
        for key in ("recipe", "plan"):
            record[key]
        for entry in record["inputs"]:
            _ = entry["name"], entry["identity"], entry["files"].keys()
        texts = [*record["outputs"].values(), *(name for shard in record["shards"] for name in shard)]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("its digests or shards are no texts")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is damaged: {error}", "its weights may be good, but nothing says what they are"
        ) from error
    return record


def verify(
    out: str | Path, *, places: Mapping[str, str | Path] | None = None, memory: int = MEMORY,
    threads: int | None = None, device: str = "cpu", on_event: OnEvent = ignore,
) -> dict[str, Any]:  # fmt: skip
    """Compute a finished merge again from its recipe and compare every byte. Raises ArtifactError with what differs.

    `places` says where inputs lie that have moved since, by their names in the recipe; `base` is the base's.
    """
    folder = Path(out)
    record = read_record(folder)
    recipe = parse(record["recipe"], str(record_path(folder)))
    known = {part.name: part.model for part in recipe.parts} | ({"base": recipe.base} if recipe.base else {})
    moved = {name: str(place) for name, place in (places or {}).items()}
    if not recipe.base and "base" in moved:
        recipe, known = replace(recipe, base=moved["base"]), known | {"base": moved["base"]}
    unknown = [f"the recipe has no input {name!r}{guess(name, known)}" for name in moved if name not in known]
    if unknown:
        raise UsageError(unknown, f"it has {', '.join(known)}")
    recipe = recipe.renamed({known[name]: place for name, place in moved.items()})
    try:
        made = plan(recipe, memory=memory, threads=threads, device=device, on_event=on_event)
    except SteerError as error:
        hint = "verify from the folder in which the merge was made, or say where its inputs are: --vector NAME=PATH"
        raise ArtifactError(error.problems, hint) from error
    with made.pool:
        _lay_out_as_recorded(made, record["shards"])
        if made.digest != record["plan"]:
            changed = [
                f"the input {before['name']} is another one now: {after['identity']}, not {before['identity']}"
                for before, after in zip(record["inputs"], card.inputs(made), strict=False)
                if before["identity"] != after["identity"]
            ]
            raise ArtifactError(
                changed or [f"the plan of {folder} can't be made again: the recipe or the arithmetic has changed"],
                "verify with the inputs it was made from",
            )
        problems = model_folder.verify(made, folder, record, on_event=on_event)
    if problems:
        raise ArtifactError([f"{folder}: {problem}" for problem in problems], "make the merge again")
    return record


def _lay_out_as_recorded(made: Plan, shards: list[list[str]]) -> None:
    """Lay the plan out as the record says, whatever the size of a shard was then."""
    by_name = {job.name: job for job in made.jobs}
    if sorted(by_name) == sorted(name for shard in shards for name in shard):
        made.shards = [[by_name[name] for name in shard] for shard in shards]
