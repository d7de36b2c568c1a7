"""Walking over commits: newest first, ancestors, and the base of a three-way merge."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from steer.store.history import graph
from steer.store.history.graph import Node
from steer.store.layout import Store
from steer.store.objects.model import Commit, read_commit


def parents_of(store: Store, digest: str) -> tuple[str, ...]:
    """The commits before a commit."""
    return graph.node(store, digest).parents


def walk(store: Store, tips: Sequence[str]) -> Iterator[Commit]:
    """The commits that these tips lead to, each once, newest first and always before its parents.

    Read one at a time, so that the first few of a long history cost only themselves. Raises ArtifactError.
    """
    return (read_commit(store, node.digest) for node in nodes(store, tips))


def nodes(store: Store, tips: Sequence[str]) -> Iterator[Node]:
    """As `walk`, without reading the commits that `.steer/graph` remembers."""
    known = graph.load(store)
    seen: set[str] = set()
    waiting: list[tuple[float, str, Node]] = []

    def add(digest: str, at_most: float) -> None:
        if digest not in seen:
            seen.add(digest)
            node = known.get(digest) or graph.node_of(read_commit(store, digest))
            # A parent is never shown before its child, even if a clock was wrong.
            heapq.heappush(waiting, (-min(node.time, at_most), digest, node))

    for tip in tips:
        add(tip, float("inf"))
    while waiting:
        time, _, node = heapq.heappop(waiting)
        yield node
        for parent in node.parents:
            add(parent, -time)


def ancestors(store: Store, digest: str) -> set[str]:
    """A commit and all before it."""
    return {node.digest for node in nodes(store, [digest])}


def merge_base(store: Store, a: str, b: str) -> str | None:
    """The newest commit from which both come; None if they share none.

    Of several that are equally good (criss-cross merges) the newest is taken; ties are broken by digest.
    """
    of_a = ancestors(store, a)
    shared = [node for node in nodes(store, [b]) if node.digest in of_a]
    behind: set[str] = set()
    for node in shared:  # newest first: what lies behind a shared commit is no better than it
        if node.digest not in behind:
            behind.update(each for each in ancestors(store, node.digest) if each != node.digest)
    best = [node for node in shared if node.digest not in behind]
    return max(best, key=lambda node: (node.time, node.digest)).digest if best else None
