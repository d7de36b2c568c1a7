"""How completions stand in a forward pass: as prefix trees in one row, or as rows padded on the right.

In a tree every distinct token is computed once: the beginning that all completions share stands once in each row, and
the prompt of two completions once in its pack. Tokens are distinct if a scope could tell them apart: completion tokens
behind prompts of different length are not shared, prompt tokens are. The last token of a completion predicts nothing
and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.capture.packing import Pack, common_prefix, packs, passes
from probes.models.completions import Completion
from vectors.expression import Scope

PACK = 64  # most tokens of a pack: the cost of attention grows with the square of its size
PASS = 1024  # most tokens of a pass of one composition, padding included


class Predicted(NamedTuple):
    """The tokens of one completion, whose number is `item`.

    `slots` int64 [tokens] is where in `Part.kept` each is predicted, `ids` int64 [tokens] what it is.
    """

    item: int
    slots: Tensor
    ids: Tensor


class Part(NamedTuple):
    """The completions of one pass.

    `ids`, `depths` and `prompt_lengths` int64 [rows, tokens] are each token, its position in its sequence (-1 for
    padding), and the length of its prompt. `kept` int64 [n] are the positions, in the flattened rows, that predict
    tokens of completions. `masks` are the packs' of a tree, bool [tokens of the pack, prefix + tokens of the pack],
    behind the `prefix` tokens that all share; None for padded rows.
    """

    ids: Tensor
    depths: Tensor
    prompt_lengths: Tensor
    kept: Tensor
    predicted: list[Predicted]
    prefix: int = 0
    masks: list[Tensor] | None = None

    def to(self, device: torch.device) -> Part:
        """The same on a device; what is predicted stays on the CPU."""
        masks = None if self.masks is None else [mask.to(device) for mask in self.masks]
        ids, depths, lengths, kept = (each.to(device) for each in self[:4])
        return self._replace(ids=ids, depths=depths, prompt_lengths=lengths, kept=kept, masks=masks)

    def covered(self, scope: Scope | None) -> Tensor:
        """Which tokens a scope covers, bool [rows, tokens]; never padding."""
        real = self.depths >= 0
        if scope is None:
            return real
        result = torch.zeros_like(real)
        for length in self.prompt_lengths.unique().tolist():
            start, stop = scope.span(length)
            inside = (self.depths >= start) & (self.depths < min(stop, 2**62))
            result |= (self.prompt_lengths == length) & inside
        return result & real


def trees(completions: Sequence[Completion], indices: Sequence[int]) -> Iterator[Part]:
    """The completions at `indices` as prefix trees, in passes of about `PASS` tokens."""
    base = 1 + max(max(completions[index].ids) for index in indices)
    sequences = [_distinct(completions[index], base) for index in indices]
    prefix = 0
    if len(indices) > 1:
        # Where the shortest completion is all of a shared beginning, a token of it is left to the packs.
        prefix = common_prefix(sequences)
    shared = sequences[0][:prefix]
    for group in passes(packs([sequence[prefix:] for sequence in sequences], PACK), PASS - prefix):
        yield _tree(completions, indices, shared, group, base)


def _distinct(completion: Completion, base: int) -> list[int]:
    """The ids but the last, each completion token with the prompt's length in its number, so that only tokens that
    scopes treat alike are equal."""
    behind = base * (completion.prompt_length + 1)
    return [*completion.prompt_ids, *(behind + token for token in completion.completion_ids[:-1])]


def _tree(
    completions: Sequence[Completion], indices: Sequence[int], shared: list[int], group: Sequence[Pack], base: int
) -> Part:
    """One row: the shared beginning, then the packs of the group."""
    prefix = len(shared)
    coded, depths, masks = list(shared), list(range(prefix)), []
    slot_of: dict[int, int] = {}
    predicted = []
    for pack in group:
        offset, count = len(coded), len(pack.ids)
        coded += pack.ids
        depths += [prefix + depth for depth in pack.depths]
        visible = torch.zeros(count, prefix + count, dtype=torch.bool)
        visible[:, :prefix] = True
        for position, nodes in pack.paths.items():
            path = torch.tensor(nodes)
            visible[path[:, None], prefix + path[None, :]] |= torch.ones(len(path), len(path)).tril().bool()
            completion = completions[indices[position]]
            sequence = [*range(prefix), *(offset + node for node in nodes)]
            places = sequence[completion.prompt_length - 1 :]
            slots = [slot_of.setdefault(place, len(slot_of)) for place in places]
            ids = torch.tensor(completion.completion_ids)
            predicted.append(Predicted(indices[position], torch.tensor(slots), ids))
        masks.append(visible)
    tokens = torch.tensor(coded)
    # A prompt token counts as one of the longest prompt: no scope tells prompts of different length apart there.
    longest = max(completions[index].prompt_length for index in indices)
    lengths = torch.where(tokens >= base, tokens // base - 1, longest)
    return Part(
        (tokens % base)[None], torch.tensor(depths)[None], lengths[None], torch.tensor(list(slot_of)), predicted,
        prefix, masks,
    )  # fmt: skip


def padded(completions: Sequence[Completion], indices: Sequence[int]) -> Iterator[Part]:
    """The completions at `indices` as rows padded on the right, those of similar length together."""
    order = sorted(indices, key=lambda index: completions[index].length)
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * completions[index].length > PASS:
            yield _rows(completions, batch)
            batch = []
        batch.append(index)
    if batch:
        yield _rows(completions, batch)


def _rows(completions: Sequence[Completion], batch: Sequence[int]) -> Part:
    width = max(completions[index].length for index in batch) - 1
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    depths = torch.full((len(batch), width), -1)
    lengths = torch.tensor([[completions[index].prompt_length] for index in batch]).expand(-1, width)
    kept: list[int] = []
    predicted = []
    for row, index in enumerate(batch):
        sequence = completions[index].ids[:-1]
        ids[row, : len(sequence)] = torch.tensor(sequence)
        depths[row, : len(sequence)] = torch.arange(len(sequence))
        places = range(row * width + completions[index].prompt_length - 1, row * width + len(sequence))
        slots = torch.arange(len(kept), len(kept) + len(places))
        kept += places
        predicted.append(Predicted(index, slots, torch.tensor(completions[index].completion_ids)))
    return Part(ids, depths, lengths, torch.tensor(kept), predicted)
