"""How every single item answers to strength: least-squares slopes, the share that goes the wrong way, monotonicity.

Tan et al. 2024, arXiv:2407.12404: a mean effect can hide that half of the items are steered the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.statistics.proportions import proportion


class Slopes(NamedTuple):
    """The slopes of items: quartiles, mean, and the share below zero with its 95 % interval."""

    mean: float
    low_quartile: float
    median: float
    high_quartile: float
    anti_steered: float
    anti_steered_low: float
    anti_steered_high: float
    items: int


def slopes(strengths: Sequence[float], figures: Tensor) -> Tensor:
    """The least-squares slope of each item's figure over strengths; figures [strengths, items], float64 [items]."""
    centred = torch.tensor(strengths, dtype=torch.float64)
    centred = centred - centred.mean()
    return centred @ figures.double() / centred.square().sum()


def distribution(values: Tensor, groups: Sequence[str] | None = None) -> Slopes:
    """The distribution of slopes [items]."""
    low, median, high = values.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    negative = (values < 0).double()
    share, lowest, highest = proportion(negative, groups)
    return Slopes(float(values.mean()), low, median, high, share, lowest, highest, len(values))


def spearman(strengths: Sequence[float], values: Tensor) -> float:
    """Spearman's rank correlation of values [strengths] with strengths; ties share a rank; 0 where nothing varies."""
    ranks = [_ranks(torch.tensor(strengths, dtype=torch.float64)), _ranks(values.double().contiguous())]
    a, b = (each - each.mean() for each in ranks)
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties averaged."""
    ordered = values.sort().values
    first = torch.searchsorted(ordered, values, right=False)
    last = torch.searchsorted(ordered, values, right=True)
    return (first + last - 1).double() / 2
