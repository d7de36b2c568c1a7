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


def covariance_direction(states: Tensor, seed: int) -> Tensor:
    """A random direction with the covariance of states [tokens, hidden]; float64 [hidden], of no particular length.

    A combination of the centred states with normal weights has exactly their covariance. An isotropic direction would
    lie almost wholly outside the subspace that a model uses, so that to beat one proves little (arXiv:2602.06801).
    With one seed the same tokens have the same weights at every layer, so that directions of neighbouring layers, whose
    states are alike, are as alike: drawn apart, the shifts of several layers would mostly cancel.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(states), generator=generator, dtype=torch.float64)
    return weights @ (states.double() - states.double().mean(0))


def as_alike(drawn: Tensor, originals: Tensor, *, orthogonal: bool = False) -> Tensor:
    """Drawn directions [n, hidden] with the lengths of the originals [n, hidden] and their inner products, so that any
    sum of them is as long as that of the originals; float32 [n, hidden].

    What is left of the first drawn one keeps its direction. With `orthogonal` none has a part along any original. A
    direction that is zero, or of which nothing is left, becomes zero.
    """
    drawn, originals = drawn.double(), originals.double()
    if orthogonal:
        _, values, span = torch.linalg.svd(originals, full_matrices=False)
        span = span[values > _NOTHING * values.max()]
        rest = drawn - drawn @ span.T @ span
        drawn = torch.where((rest.norm(dim=1) > _NOTHING * drawn.norm(dim=1))[:, None], rest, 0.0)
    units, _ = _orthonormal(drawn)
    _, inner = _orthonormal(originals)
    return (inner.T @ units).float()


_NOTHING = 1e-9  # a share of a length below which only rounding is left


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows [n, hidden] and the upper triangle [n, n] with rows = triangle.T @ orthonormal, of which the
    diagonal is positive (Gram & Schmidt); a row that the ones before it span gets a unit of zeros."""
    columns, triangle = torch.linalg.qr(rows.T)
    diagonal = triangle.diagonal()
    signs = torch.where(diagonal < 0, -1.0, 1.0)
    spanned = diagonal.abs() <= _NOTHING * rows.norm(dim=1)
    units = (columns * torch.where(spanned, 0.0, signs)).T
    return units, triangle * signs[:, None]
