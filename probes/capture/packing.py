"""Packs sequences by their prefix tree, so that a prefix shared by several sequences is computed once.

A pack is a set of sequences laid out in one row as the nodes of their prefix tree, without padding. The attention mask
lets each node attend only to itself and its ancestors, and `position_ids` are the depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STRETCH = 4  # a pack may grow to this many times its budget, rather than compute a long prefix again


@dataclass(frozen=True)
class Pack:
    """A prefix tree of tokens; each list has one entry for each node."""

    ids: list[int]  # token ids
    parents: list[int]  # the parent's node, which precedes its children; -1 for none
    depths: list[int]  # from 0
    paths: dict[int, list[int]]  # the nodes of each sequence, in order, by the sequence's index


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """Length of the common prefix of all sequences, leaving each at least one token."""
    # In lexicographic order, the first and the last share only what all share.
    low, high = min(sequences), max(sequences)
    shared = 0
    for a, b in zip(low, high, strict=False):
        if a != b:
            break
        shared += 1
    return min(shared, min(len(s) for s in sequences) - 1)


def packs(sequences: Sequence[list[int]], budget: int) -> list[Pack]:
    """Cut the prefix tree of the sequences into packs of at most `budget` nodes.

    A pack exceeds the budget for a single long sequence; and, up to `STRETCH` times, if a new pack would have to
    compute again a shared prefix that is longer than a quarter of what the next sequence adds. Neighbours in
    lexicographic order share the longest prefixes, so packs are runs of that order; only prefixes shared across packs
    are computed more than once.
    """
    order = sorted(range(len(sequences)), key=lambda index: sequences[index])
    result: list[Pack] = []
    pack = Pack([], [], [], {})
    path: list[int] = []  # the nodes of the previous sequence
    for index in order:
        sequence = sequences[index]
        shared = 0
        while shared < min(len(path), len(sequence)) and pack.ids[path[shared]] == sequence[shared]:
            shared += 1
        added = len(sequence) - shared
        limit = STRETCH * budget if 4 * shared > added else budget
        if pack.ids and len(pack.ids) + added > limit:
            result.append(pack)
            pack, path, shared = Pack([], [], [], {}), [], 0
        path = path[:shared]
        for depth in range(shared, len(sequence)):
            pack.parents.append(path[-1] if path else -1)
            pack.ids.append(sequence[depth])
            pack.depths.append(depth)
            path.append(len(pack.ids) - 1)
        pack.paths[index] = list(path)
    if pack.ids:
        result.append(pack)
    return result


def passes(parts: Sequence[Pack], budget: int) -> list[list[Pack]]:
    """Groups of packs for one forward pass: at most `budget` tokens each, more only for a single larger pack."""
    groups: list[list[Pack]] = []
    size = 0
    for pack in parts:
        if not groups or size + len(pack.ids) > budget:
            groups.append([])
            size = 0
        groups[-1].append(pack)
        size += len(pack.ids)
    return groups
