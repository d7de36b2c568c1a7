"""A version as what other commands take: a base, an expression over files, and merged weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from steer.store import blobs, names
from steer.store.layout import Store
from steer.store.objects.model import STEERING, TASK, Part, Personality, read_commit, read_composition
from vectors.errors import OutputError, UsageError
from vectors.events import OnEvent, ignore
from vectors.storage.files import canonical_json, digest_file, write_atomically
from vectors.storage.folders import new_folder
from vectors.storage.locks import temporary_folder


class Realised(NamedTuple):
    """A version: its commit and composition, and the expression over `files` (names to vector files), or None."""

    commit: str
    composition: str
    personality: Personality
    expression: str | None
    files: Mapping[str, Path]


def realise(store: Store, version: str) -> Realised:
    """What a version stands for, with files that lie in the store. Raises UsageError, ArtifactError."""
    commit = read_commit(store, names.resolve(store, version))
    personality = read_composition(store, commit.composition)
    parts = personality.of_kind(STEERING)
    expression = str(personality.expression()) if parts else None
    return Realised(commit.digest, commit.composition, personality, expression, files_of(store, parts))


def files_of(store: Store, parts: tuple[Part, ...]) -> dict[str, Path]:
    """A file called NAME.safetensors for each part: links in `.steer/parts`, one folder for each digest."""
    found = {}
    for part in parts:
        folder = store.root / "parts" / part.digest.removeprefix("sha256:")
        file = folder / f"{part.name}.safetensors"
        if not file.is_file() or file.stat().st_size != part.size:
            folder.mkdir(parents=True, exist_ok=True)
            blobs.take(store, part.digest, file)
        found[part.name] = file
    return found


def build(store: Store, personality: Personality, out: Path, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Write a composition to a folder: the vectors with `expression.json`, or a model's folder of merged weights.

    The same composition gives the same bytes. A composition with both kinds gives the model's folder, and the vectors
    beside it in OUT-steering. Raises UsageError, ModelError, OutputError.
    """
    steering, task = personality.of_kind(STEERING), personality.of_kind(TASK)
    if not personality.parts:
        raise UsageError("the composition has no parts", "add some: steer add warm.safetensors")
    made: dict[str, Any] = {"expression": str(personality.expression()) if steering else None, "folders": []}
    beside = out.with_name(f"{out.name}-steering") if task else out
    for target in {out, beside}:
        if target.exists():
            raise OutputError(f"{target} exists", "choose another --out, or remove it")
    if task:
        made["weights"] = _merged(store, personality, task, out, on_event)
        made["folders"].append(str(out))
    if steering:
        with new_folder(beside) as folder:
            for part in steering:
                blobs.take(store, part.digest, folder / f"{part.name}.safetensors")
            value = {"base": personality.base, "expression": made["expression"], "serve": personality.serve}
            write_atomically(folder / "expression.json", canonical_json(value).encode())
        made["folders"].append(str(beside))
    return made


def _merged(store: Store, personality: Personality, task: tuple[Part, ...], out: Path, on_event: OnEvent) -> str:
    """Merge the task vectors by the method of `merge:`; returns the digest of the plan."""
    from merges import api, methods
    from merges.recipes import recipe as recipes

    options = dict(personality.merge)
    method = str(options.pop("method", "task_arithmetic"))
    methods.find(method)
    with temporary_folder(store.root / "merging") as folder:
        inputs = []
        for part in task:
            file = folder / f"{part.name}.safetensors"
            blobs.take(store, part.digest, file)
            inputs.append(recipes.Part(str(file), part.name, {"weight": part.strength}))
        # The record names the parts, not where they lay for the merge: the same version has the same bytes anywhere.
        recorded = {each.model: f"{each.name}.safetensors" for each in inputs}
        recipe = recipes.Recipe(method, tuple(inputs), personality.base, options)
        record = api.merge(recipe, out, recorded=recorded, on_event=on_event)
    return str(record["plan"])


def problems_of_build(store: Store, commit: str, folder: Path, *, on_event: OnEvent = ignore) -> list[str]:
    """Where a folder differs from what a commit builds, file by file; empty if every byte is the same."""
    personality = read_composition(store, read_commit(store, commit).composition)
    problems = []
    with temporary_folder(store.root / "rebuilt") as work:
        made = build(store, personality, work / "made", on_event=on_event)
        for again in map(Path, made["folders"]):
            there = folder if again.name == "made" else folder.with_name(f"{folder.name}-steering")
            files = {each.relative_to(again) for each in again.rglob("*") if each.is_file()}
            found = {each.relative_to(there) for each in there.rglob("*") if each.is_file()}
            problems += [f"{there / name} is missing" for name in sorted(files - found)]
            problems += [f"{there / name} is not part of the build" for name in sorted(found - files)]
            problems += [
                f"{there / name} has other bytes than the build"
                for name in sorted(files & found)
                if digest_file(again / name) != digest_file(there / name)
            ]
    return problems
