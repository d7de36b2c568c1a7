"""Which tokens share a forward pass: a prefix tree of the sequences, cut into packs that compute every token once.

Sequences that begin alike share the tokens they begin with. A pack is a set of sequences laid out as the nodes of
their prefix tree, in one row, without padding: each node sees its ancestors alone, through the attention mask, and
stands at its depth, through `position_ids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STRETCH = 4


@dataclass(frozen=True)
class Pack:
    """A tree of tokens: `ids` and `parents` of its nodes (a parent precedes its children; -1 for none), their
    `depths` from 0, and of each sequence (by index) the nodes of its path, in order."""

    ids: list[int]
    parents: list[int]
    depths: list[int]
    paths: dict[int, list[int]]


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many tokens all sequences begin with, leaving each at least one of its own."""
    # The least and the greatest in order differ as early as any two.
    low, high = min(sequences), max(sequences)
    shared = 0
    for a, b in zip(low, high, strict=False):
        if a != b:
            break
        shared += 1
    return min(shared, min(len(s) for s in sequences) - 1)


def packs(sequences: Sequence[list[int]], budget: int) -> list[Pack]:
    """Cut the prefix tree of the sequences into packs of at most `budget` nodes.

    A pack is larger for one long sequence, and, up to `STRETCH` times the budget, where a cut would compute again more
    than a quarter of what the next sequence adds. Neighbours in lexicographic order share the longest prefixes, so
    packs are runs of that order; only what two packs share is computed twice.
    """
    order = sorted(range(len(sequences)), key=lambda index: sequences[index])
    found: list[Pack] = []
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
            found.append(pack)
            pack, path, shared = Pack([], [], [], {}), [], 0
        path = path[:shared]
        for depth in range(shared, len(sequence)):
            pack.parents.append(path[-1] if path else -1)
            pack.ids.append(sequence[depth])
            pack.depths.append(depth)
            path.append(len(pack.ids) - 1)
        pack.paths[index] = list(path)
    if pack.ids:
        found.append(pack)
    return found


def passes(parts: Sequence[Pack], budget: int) -> list[list[Pack]]:
    """Packs that go through the model together: runs of at most `budget` tokens (more only for one large pack)."""
    found: list[list[Pack]] = []
    size = 0
    for pack in parts:
        if not found or size + len(pack.ids) > budget:
            found.append([])
            size = 0
        found[-1].append(pack)
        size += len(pack.ids)
    return found
