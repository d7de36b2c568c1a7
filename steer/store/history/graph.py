"""The commits as a graph, remembered in `.steer/graph`, so that a walk over ten thousand reads one file.

A line for each commit: its digest, its composition, its time, its parents, and a checksum of the line. The file only
saves time: a line that is damaged or missing is made again from the commit, and `steer verify` compares them all.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from steer.store.layout import Store
from steer.store.objects.model import Commit, read_commit
from vectors.errors import SteerError
from vectors.storage.files import append_lines


class Node(NamedTuple):
    """A commit without its message: what a walk needs."""

    digest: str
    composition: str
    time: float
    parents: tuple[str, ...]


def load(store: Store) -> dict[str, Node]:
    """The remembered commits, by digest; lines that are damaged are left out."""
    path = store.root / "graph"
    try:
        status = path.stat()
    except OSError:
        return {}
    return _loaded(path, status.st_size, status.st_mtime_ns)


def node(store: Store, digest: str) -> Node:
    """A commit, by the file or by itself. Raises ArtifactError."""
    return load(store).get(digest) or node_of(read_commit(store, digest))


def node_of(commit: Commit) -> Node:
    """The node of a commit."""
    return Node(commit.digest, commit.composition, commit.time, commit.parents)


def remember(store: Store, tips: Iterable[str]) -> None:
    """Add what these commits lead to and the file does not have; only inside of `layout.changing`."""
    known, new = load(store), dict[str, Node]()
    waiting = [digest for digest in tips if digest not in known]
    try:
        while waiting:
            digest = waiting.pop()
            if digest not in new:
                new[digest] = node_of(read_commit(store, digest))
                waiting += [parent for parent in new[digest].parents if parent not in known]
    except SteerError:
        return  # a damaged commit, which whoever needs it reports
    if new:
        append_lines(store.root / "graph", [_line(each) for each in new.values()])


def problems(store: Store, seen: Iterable[str]) -> Iterator[str]:
    """Where the file differs from the commits."""
    path = store.root / "graph"
    if not path.is_file():
        return
    *lines, last = path.read_bytes().split(b"\n")
    # A last line that a kill cut off is no damage; a whole one whose line break was changed is.
    lines += [last] if _node(last[:-1]) is not None else []
    for i, line in enumerate(lines, 1):
        if _node(line) is None:
            yield f"line {i} of {path} is damaged (remove the file: it only saves time, and is made again)"
    known = load(store)
    for digest in seen:
        with contextlib.suppress(SteerError):  # of a damaged commit, which steer verify names itself
            if known.get(digest) in (None, node_of(read_commit(store, digest))):
                continue
            yield f"{path} differs from the commit {digest} (remove the file: it only saves time, and is made again)"


@functools.lru_cache(maxsize=4)
def _loaded(path: Path, _size: int, _time: int) -> dict[str, Node]:
    nodes = (_node(line) for line in path.read_bytes().split(b"\n")[:-1])
    return {each.digest: each for each in nodes if each is not None}


def _line(each: Node) -> bytes:
    words = [each.digest[7:], each.composition[7:], repr(each.time), *(parent[7:] for parent in each.parents)]
    text = " ".join(words).encode()
    return text + b" %08x" % zlib.crc32(text)


def _node(line: bytes) -> Node | None:
    text, _, check = line.rpartition(b" ")
    try:
        if int(check, 16) != zlib.crc32(text):
            return None
        digest, composition, time, *parents = text.decode().split(" ")
        found = Node(f"sha256:{digest}", f"sha256:{composition}", float(time), tuple(f"sha256:{p}" for p in parents))
    except ValueError:
        return None
    return found if all(len(each) == 64 for each in (digest, composition, *parents)) else None
