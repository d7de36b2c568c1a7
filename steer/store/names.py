"""What people write for a version: a name, name:tag, name@alias, a digest or the beginning of one, and ~N behind it."""

from __future__ import annotations

import os
import re

from steer.store import blobs, refs
from steer.store.history import graph
from steer.store.layout import Store
from steer.store.objects.model import COMMIT, read_manifest
from steer.store.refs import Ref
from vectors.errors import SteerError, UsageError, guess

SHORTEST = 6  # hexadecimal digits of a prefix
SHORT = 8  # those that are shown
_BACK = re.compile(r"(?P<name>.*?)~(?P<count>\d{0,6})")
_PREFIX = re.compile(r"(?:sha256:)?(?P<digits>[0-9a-f]{6,64})")


def short(digest: str) -> str:
    """The beginning of a digest, as it is shown."""
    return digest.removeprefix("sha256:")[:SHORT]


def resolve(store: Store, text: str = "HEAD") -> str:
    """The digest of the commit that a text names.

    `HEAD` (or nothing) is the newest commit of the current branch; `:tag` and `@alias` alone are those of the current
    branch; `NAME~2` is the second commit before it. Raises UsageError for an unknown name, with a guess, and for the
    beginning of several digests, with the candidates.
    """
    digest = find(store, text)
    if digest is not None:
        return digest
    name = match["name"] if (match := _BACK.fullmatch(text)) else text
    if match and find(store, name) is not None:
        raise UsageError(f"{text} lies before the first commit", "steer log shows how many there are")
    ref = ref_of(store, name)
    if name in ("", "HEAD"):
        raise UsageError(f"the branch {ref} has no commit yet", "make one: steer commit -m MESSAGE")
    if ref is None and re.fullmatch(r"(sha256:)?[0-9a-f]{1,5}", name):
        raise UsageError(f"{name} is too short for a digest", f"write at least {SHORTEST} digits")
    known = [str(each) for each in refs.every(store)]
    raise UsageError(
        f"there is no version {name[:100]!r}{guess(name, known)}",
        f"the names are {', '.join(known[:20])}" if known else "make a first commit: steer commit -m MESSAGE",
    )


def find(store: Store, text: str) -> str | None:
    """As `resolve`, but None for a text that names no version. Raises UsageError for the beginning of several."""
    if match := _BACK.fullmatch(text):
        return _before(store, find(store, match["name"]), int(match["count"] or 1))
    ref = ref_of(store, text)
    digest = None if ref is None else refs.target(store, ref)
    if digest is not None or (match := _PREFIX.fullmatch(text)) is None:
        return digest
    found = [digest for digest in _with_prefix(store, match["digits"]) if _is_commit(store, digest)]
    if len(found) > 1:
        listed = ", ".join(blobs_short(digest) for digest in found[:10])
        raise UsageError(f"{text} is the beginning of {len(found)} commits: {listed}", "write more digits")
    return found[0] if found else None


def _before(store: Store, digest: str | None, count: int) -> str | None:
    """The commit so many first parents before another; None where the history is shorter."""
    known = graph.load(store)
    for _ in range(count):
        if digest is None:
            return None
        node = known.get(digest) or graph.node(store, digest)
        digest = next(iter(node.parents), None)
    return digest


def blobs_short(digest: str) -> str:
    """The first 16 digits of a digest: enough to choose among candidates."""
    return digest.removeprefix("sha256:")[:16]


def ref_of(store: Store, text: str) -> Ref | None:
    """The name that a text is by its form, whether it exists or not; None where it has the form of none."""
    here = refs.current(store)
    try:
        if text in ("", "HEAD"):
            return refs.branch(here)
        if text.startswith("sha256:"):
            return None
        for sign, kind in (("@", refs.alias), (":", refs.tag)):
            if sign in text:
                name, _, label = text.partition(sign)
                return kind(name or here, label)
        return refs.branch(text)
    except SteerError:
        return None


def _with_prefix(store: Store, digits: str) -> list[str]:
    if len(digits) == 64:
        return [f"sha256:{digits}"] if blobs.has(store, f"sha256:{digits}") else []
    with os.scandir(store.blobs) as entries:
        return [f"sha256:{entry.name}" for entry in entries if entry.name.startswith(digits) and len(entry.name) == 64]


def _is_commit(store: Store, digest: str) -> bool:
    if blobs.path_of(store, digest).stat().st_size > blobs.LARGEST_DOCUMENT:
        return False
    try:
        return bool(read_manifest(store, digest, COMMIT))
    except SteerError:
        return False
