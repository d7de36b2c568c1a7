"""Negative controls: class labels shuffled at random, which show what a measurement gives by chance."""

from __future__ import annotations

import torch
from torch import Tensor

from probes.seeds import child_seed


def shuffle_within(labels: Tensor, fold: Tensor, seed: int) -> Tensor:
    """Labels bool [n] permuted inside each fold, so that every fold keeps its number of positives.

    `fold` int64 [n] is the fold of each example, counted from 0.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = labels.clone()
    for f in range(int(fold.max()) + 1):
        inside = (fold == f).nonzero()[:, 0]
        shuffled[inside] = labels[inside[torch.randperm(len(inside), generator=generator)]]
    return shuffled


def shuffles(labels: Tensor, fold: Tensor, seed: int, count: int) -> list[Tensor]:
    """`count` independent permutations of the labels by `shuffle_within`."""
    return [shuffle_within(labels, fold, child_seed(seed, "shuffle", repeat)) for repeat in range(count)]
