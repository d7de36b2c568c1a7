"""Controls: what a measurement shows where there is nothing to find."""

from __future__ import annotations

import torch
from torch import Tensor

from probes.seeds import child_seed


def shuffle_within(labels: Tensor, fold: Tensor, seed: int) -> Tensor:
    """The labels permuted inside each fold, so that every fold keeps its number of positives."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = labels.clone()
    for f in range(int(fold.max()) + 1):
        inside = (fold == f).nonzero()[:, 0]
        shuffled[inside] = labels[inside[torch.randperm(len(inside), generator=generator)]]
    return shuffled


def shuffles(labels: Tensor, fold: Tensor, seed: int, count: int) -> list[Tensor]:
    """`count` times the labels, each shuffled inside each fold."""
    return [shuffle_within(labels, fold, child_seed(seed, "shuffle", repeat)) for repeat in range(count)]
