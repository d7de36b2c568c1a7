"""What people write for a version: a name, name:tag, name@alias, a digest or the beginning of one, and ~N behind it."""

from __future__ import annotations

import os
import re

from steer.store import blobs, refs
from steer.store.history.walk import parents_of
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
    if match := _BACK.fullmatch(text):
        digest = resolve(store, match["name"])
        for _ in range(int(match["count"] or 1)):
            before = parents_of(store, digest)
            if not before:
                raise UsageError(f"{text} lies before the first commit", "steer log shows how many there are")
            digest = before[0]
        return digest
    ref = ref_of(store, text)
    if ref is not None:
        digest_or_none = refs.target(store, ref)
        if digest_or_none is not None:
            return digest_or_none
        if text in ("", "HEAD"):
            raise UsageError(f"the branch {ref} has no commit yet", "make one: steer commit -m MESSAGE")
    if match := _PREFIX.fullmatch(text):
        found = [digest for digest in _with_prefix(store, match["digits"]) if _is_commit(store, digest)]
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(blobs_short(digest) for digest in found[:10])
            raise UsageError(f"{text} is the beginning of {len(found)} commits: {listed}", "write more digits")
    elif re.fullmatch(r"(sha256:)?[0-9a-f]{1,5}", text) and ref is None:
        raise UsageError(f"{text} is too short for a digest", f"write at least {SHORTEST} digits")
    known = [str(each) for each in refs.every(store)]
    raise UsageError(
        f"there is no version {text[:100]!r}{guess(text, known)}",
        f"the names are {', '.join(known[:20])}" if known else "make a first commit: steer commit -m MESSAGE",
    )


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
