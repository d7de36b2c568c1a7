"""Statistics that stream: count, mean and, where asked for, the centred second moment, mergeable in any order.

Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", eqs. 2.1: centred sums are merged, so a
large common offset of the activations costs no precision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Of `count` rows: `mean` [hidden] and `scatter` [hidden, hidden], the sum of (x - mean)(x - mean)^T; float64."""

    count: int
    mean: Tensor
    scatter: Tensor | None = None

    @staticmethod
    def of(rows: Tensor, second: bool = False) -> Moments:
        """The moments of rows [n, hidden], n > 0."""
        rows = rows.double()
        mean = rows.mean(0)
        if not second:
            return Moments(len(rows), mean)
        centred = rows - mean
        return Moments(len(rows), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of rows together."""
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        if self.scatter is None or other.scatter is None:
            return Moments(count, mean)
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)


def merged(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together. Raises ValueError for none."""
    total: Moments | None = None
    for part in parts:
        total = part if total is None else total.merge(part)
    if total is None:
        raise ValueError("there are no moments to merge")
    return total


@dataclass(frozen=True)
class Evidence:
    """What a method sees of one layer: the moments of the two classes and, where it `needs` them, more.

    `differences` are the moments of the paired differences positive - negative, None when the examples are no pairs.
    `activations` are the rows themselves, ([n, hidden], [m, hidden]), only for a method that needs "activations".
    """

    positive: Moments
    negative: Moments
    differences: Moments | None = None
    activations: tuple[Tensor, Tensor] | None = None

    @property
    def displacement(self) -> Tensor:
        """mean(positive) - mean(negative), float64 [hidden]."""
        return self.positive.mean - self.negative.mean
