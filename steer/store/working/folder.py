"""The working folder: what `personality.yaml` says, with every name looked up; committing it; what is not committed."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from steer.store import blobs, refs
from steer.store.history.differences import Difference, compare
from steer.store.layout import Store
from steer.store.objects.model import Commit, Personality, read_commit, read_composition
from steer.store.objects.writing import put_commit, put_composition
from steer.store.working import conversion, document
from steer.store.working.parts import describe, read, realised, require_readable, require_stored
from vectors.errors import UsageError
from vectors.events import OnEvent, ignore
from vectors.storage.files import digest_file
from vectors.storage.runs import environment

PACKAGES = ("steer-workbench", "torch", "transformers")


class Status(NamedTuple):
    """The working folder against the newest commit: None where there is no commit yet."""

    branch: str
    commit: Commit | None
    difference: Difference
    not_stored: tuple[str, ...]  # parts whose content is in no commit and not in the store


def commit(
    store: Store, message: str, command: str, *, parents: tuple[str, ...] = (), allow_empty: bool = False,
    content: str | None = None,
) -> Commit:  # fmt: skip
    """Make a commit of the working folder on the current branch. `parents` are further ones, of a merge.

    `content` is the text of personality.yaml, by default that of the file. Raises UsageError where nothing
    has changed, and as `read` does.
    """
    if not message.strip():
        raise UsageError("the message is empty", "say what changed and why: -m MESSAGE")
    branch = refs.branch(refs.current(store))
    tip = refs.target(store, branch)
    content = document.content_of(store.file) if content is None else content
    personality, found = realised(store, document.parsed(content, str(store.file)))
    require_stored(store, found)
    composition = put_composition(store, personality)
    if tip is not None and not parents and not allow_empty and read_commit(store, tip).composition == composition:
        raise UsageError(
            "nothing has changed since the last commit", "edit personality.yaml, or use steer add, set, rm"
        )
    before = (*([tip] if tip else []), *parents)
    return record(store, composition, content, message, command, before, {branch: tip})


def record(
    store: Store, composition: str, written: str, message: str, command: str, parents: tuple[str, ...],
    expected: Mapping[refs.Ref, str | None],
) -> Commit:  # fmt: skip
    """Store a commit of a composition and move the one branch in `expected` to it.

    Blobs first, then the commit, then the name: a kill between leaves what no name leads to.
    """
    made = Commit(
        "", composition, parents, message.strip(), refs.author(), time.time(), command, environment(*PACKAGES)
    )
    digest = put_commit(store, made, written)
    (branch,) = expected
    refs.point(store, {branch: digest}, command, expected=expected)
    return read_commit(store, digest)


def status(store: Store) -> Status:
    """What is not committed. Raises as `read` does."""
    branch = refs.current(store)
    tip = refs.target(store, refs.branch(branch))
    newest = read_commit(store, tip) if tip else None
    before = read_composition(store, newest.composition) if newest else Personality(document.read(store.file).base)
    personality, found = read(store)
    missing = tuple(each.part.name for each in found if not blobs.has(store, each.part.digest))
    return Status(branch, newest, compare(before, personality), missing)


def add(
    store: Store, target: Path, name: str | None, fields: Mapping[str, Any], *, on_event: OnEvent = ignore
) -> tuple[str, bool]:
    """Add a vector's file to the document, or change the fields of the part of that name; store its content.

    A folder of a model or an adapter is added as its exact difference from the base, which lies in the store alone.
    Returns the part's name and whether it is new. Raises ArtifactError, UsageError, and ModelError for a folder.
    """
    if target.is_dir():
        name = name or target.resolve().name
        base = document.read(store.file).base
        with conversion.as_task_vector(store, target, base, fields, on_event=on_event) as file:
            require_readable(file, describe(file).kind)
            digest = digest_file(file)
            if blobs.has(store, digest) or file.stat().st_size < blobs.COPIED:
                blobs.put_file(store, file, digest)
            else:  # linked, not copied
                file.chmod(0o444)
                blobs.adopt(store, file, digest)
        return name, document.set_part(store.file, name, {"path": None, "digest": digest, **fields})
    require_readable(target, describe(target).kind)  # refused before anything is written
    name = name or target.name.removesuffix(".safetensors")
    digest = blobs.put_file(store, target)
    relative = os.path.relpath(target, store.work)
    beside = relative == f"{name}.safetensors"
    inside = not relative.startswith("..")
    placed = {"path": None if beside or not inside else relative, "digest": None if inside else digest}
    return name, document.set_part(store.file, name, {**placed, **fields})


def lock(store: Store) -> list[tuple[str, str]]:
    """Pin every part of the document to its digest; returns names and digests. What was a path becomes a digest."""
    personality, found = read(store)
    require_stored(store, found)
    for part in personality.parts:
        document.set_part(store.file, part.name, {"digest": part.digest, "path": None, "strength": part.strength})
    return [(part.name, part.digest) for part in personality.parts]
