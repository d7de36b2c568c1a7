"""Removes blobs that nothing leads to: marked from the names, the record of their moves and the working folder."""

from __future__ import annotations

import contextlib
import time
from typing import Any, NamedTuple

from steer.store import blobs, layout, referrers, refs
from steer.store.layout import Store
from steer.store.objects.model import COMMIT, COMPOSITION
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
    """Every digest that something leads to."""
    since = time.time() - days * 86400
    tips = set(refs.every(store).values())
    tips.update(refs.pointed_at([entry for entry in refs.entries(store) if entry.time >= since]))
    marked: set[str] = set()
    waiting = [tip for tip in tips if blobs.has(store, tip)]
    while waiting:
        digest = waiting.pop()
        if digest in marked:
            continue
        marked.add(digest)
        waiting += _led_to(store, digest)
    marked.update(_of_working_folder(store))
    return marked | _referrers(store, marked)


def _led_to(store: Store, digest: str) -> list[str]:
    """What a manifest leads to: its config, layers and subject; of a commit, the commits before it."""
    if not blobs.has(store, digest) or blobs.path_of(store, digest).stat().st_size > blobs.LARGEST_DOCUMENT:
        return []
    try:
        value = blobs.read_json(store, digest)
    except SteerError:
        return []  # a layer, such as a vector
    if value.get("artifactType") not in (COMMIT, COMPOSITION) and "layers" not in value:
        return [each for each in _parents(value) if blobs.has(store, each)]
    described = [value.get("config"), value.get("subject"), *(value.get("layers") or [])]
    return [
        each["digest"]
        for each in described
        if isinstance(each, dict) and blobs.DIGEST.fullmatch(str(each.get("digest")))
    ]


def _parents(value: dict[str, Any]) -> list[str]:
    """The commits before, in a commit's config."""
    named = [*(value.get("parents") or []), value.get("composition")] if "parents" in value else []
    return [each for each in named if isinstance(each, str) and blobs.DIGEST.fullmatch(each)]


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
                found.update([digest, *_led_to(store, digest)])
    return found
