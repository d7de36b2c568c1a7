"""Removes blobs that nothing leads to: marked from the names, the record of their moves and the working folder."""

from __future__ import annotations

import contextlib
import time
from typing import NamedTuple

from steer.store import blobs, layout, referrers, refs
from steer.store.history.walk import walk
from steer.store.layout import Store
from steer.store.objects.model import read_manifest
from steer.store.working import document
from vectors.errors import SteerError

FRESH = 3600.0  # seconds for which a blob is left alone: a command may be about to point to it
REMEMBERED = 30.0  # days for which what a name has pointed to is left alone


class Unreachable(NamedTuple):
    """Blobs that nothing leads to, with their sizes, and how many are left alone because they are fresh."""

    sizes: dict[str, int]
    fresh: int


def unreachable(store: Store, *, days: float = REMEMBERED, fresh: float = FRESH) -> Unreachable:
    """What `collect` would remove. Raises ArtifactError for a damaged store: then nothing can be told."""
    marked = marks(store, days=days)
    now = time.time()
    sizes, young = {}, 0
    for digest in blobs.every(store):
        if digest in marked:
            continue
        with contextlib.suppress(FileNotFoundError):
            status = blobs.path_of(store, digest).stat()
            if now - status.st_mtime < fresh:
                young += 1
            else:
                sizes[digest] = status.st_size
    return Unreachable(sizes, young)


def collect(store: Store, *, days: float = REMEMBERED, fresh: float = FRESH) -> Unreachable:
    """Remove what nothing leads to, while no name can move; returns what was removed."""
    with layout.changing(store):
        refs.complete(store)
        found = unreachable(store, days=days, fresh=fresh)
        removed = {}
        for digest, size in found.sizes.items():
            path = blobs.path_of(store, digest)
            with contextlib.suppress(FileNotFoundError):
                # A command may have refreshed it since it was listed.
                if time.time() - path.stat().st_mtime >= fresh:
                    path.unlink()
                    removed[digest] = size
        return Unreachable(removed, found.fresh)


def marks(store: Store, *, days: float = REMEMBERED) -> set[str]:
    """Every digest that something leads to. Raises ArtifactError where that can't be told: a version is damaged."""
    since = time.time() - days * 86400
    recent = [entry for entry in refs.entries(store) if entry.time >= since]
    # A name may have pointed to what has been collected since; what a name points to now must be there.
    remembered = [digest for digest in refs.pointed_at(recent) if blobs.has(store, digest)]
    marked: set[str] = set()
    for commit in walk(store, [*refs.every(store).values(), *remembered]):
        marked.update(_with_files(store, commit.digest))
        marked.update(_with_files(store, commit.composition))
    marked.update(_of_working_folder(store))
    return marked | _referrers(store, marked)


def _with_files(store: Store, digest: str) -> list[str]:
    """A manifest, its config and its layers. Raises ArtifactError."""
    value = read_manifest(store, digest)
    return [digest, value["config"]["digest"], *(layer["digest"] for layer in value["layers"])]


def _of_working_folder(store: Store) -> set[str]:
    """The digests that `personality.yaml` names."""
    try:
        return {entry.digest for entry in document.read(store.file).parts if entry.digest}
    except SteerError:
        return set()


def _referrers(store: Store, marked: set[str]) -> set[str]:
    """What refers to the compositions that are marked, such as evaluations and signatures, with its files."""
    found: set[str] = set()
    for composition, digests in referrers.every(store).items():
        if composition in marked:
            for digest in digests:
                found.update(_with_files(store, digest))
    return found
