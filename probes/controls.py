"""Negative controls: what a measurement gives by chance. Labels shuffled at random, and directions drawn at random."""

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


def covariance_direction(states: Tensor, length: float, seed: int) -> Tensor:
    """A random direction of this length with the covariance of states [tokens, hidden]; float32 [hidden].

    A combination of the centred states with normal weights has exactly their covariance. An isotropic direction would
    lie almost wholly outside the subspace that a model uses, so that to beat one proves little (arXiv:2602.06801).
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(states), generator=generator, dtype=torch.float64)
    centred = states.double() - states.double().mean(0)
    return _of_length(weights @ centred, length)


def without(direction: Tensor, other: Tensor, length: float) -> Tensor:
    """The part of a direction orthogonal to `other`, at this length; float32 [hidden], zero where nothing is left."""
    unit = other.double() / other.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
    return _of_length(direction.double() - (direction.double() @ unit) * unit, length)


def _of_length(direction: Tensor, length: float) -> Tensor:
    norm = direction.norm()
    return (direction * (length / norm) if float(norm) > 0 else torch.zeros_like(direction)).float()
