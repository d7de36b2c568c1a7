"""Walking over commits: newest first, ancestors, and the base of a three-way merge."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from steer.store.layout import Store
from steer.store.objects.model import Commit, read_commit


def parents_of(store: Store, digest: str) -> tuple[str, ...]:
    """The commits before a commit."""
    return read_commit(store, digest).parents


def walk(store: Store, tips: Sequence[str]) -> Iterator[Commit]:
    """The commits that these tips lead to, each once, newest first and always before its parents.

    Read one at a time, so that the first few of a long history cost only themselves. Raises ArtifactError.
    """
    seen: set[str] = set()
    waiting: list[tuple[float, str, Commit]] = []

    def add(digest: str, at_most: float) -> None:
        if digest not in seen:
            seen.add(digest)
            commit = read_commit(store, digest)
            # A parent is never shown before its child, even if a clock was wrong.
            heapq.heappush(waiting, (-min(commit.time, at_most), digest, commit))

    for tip in tips:
        add(tip, float("inf"))
    while waiting:
        time, _, commit = heapq.heappop(waiting)
        yield commit
        for parent in commit.parents:
            add(parent, -time)


def ancestors(store: Store, digest: str) -> dict[str, Commit]:
    """A commit and all before it, by digest."""
    return {commit.digest: commit for commit in walk(store, [digest])}


def merge_base(store: Store, a: str, b: str) -> str | None:
    """The newest commit from which both come; None if they share none.

    Of several that are equally good (criss-cross merges) the newest is taken; ties are broken by digest.
    """
    of_a = ancestors(store, a)
    shared = [commit for commit in walk(store, [b]) if commit.digest in of_a]
    behind: set[str] = set()
    for commit in shared:  # newest first: what lies behind a shared commit is no better than it
        if commit.digest not in behind:
            behind.update(each for each in ancestors(store, commit.digest) if each != commit.digest)
    best = [commit for commit in shared if commit.digest not in behind]
    return max(best, key=lambda commit: (commit.time, commit.digest)).digest if best else None
