"""Clusters: items that share a template or a concept vary together, so they are resampled together."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.seeds import child_seed

RESAMPLES = 2000


class Clusters(NamedTuple):
    """The number of items and the sum of their values in each cluster, float64 [clusters]."""

    sizes: Tensor
    sums: Tensor

    @property
    def mean(self) -> float:
        """The mean over items."""
        return float(self.sums.sum() / self.sizes.sum())


def clusters_of(values: Tensor, groups: Sequence[str] | None = None) -> Clusters:
    """Values [items] by their groups; without groups every item is a cluster. Clusters are in order of their names."""
    values = values.double()
    if groups is None:
        return Clusters(torch.ones_like(values), values)
    names = {name: position for position, name in enumerate(sorted(set(groups)))}
    index = torch.tensor([names[group] for group in groups], dtype=torch.int64)
    zeros = torch.zeros(len(names), dtype=torch.float64)
    return Clusters(
        zeros.clone().index_add_(0, index, torch.ones_like(values)), zeros.clone().index_add_(0, index, values)
    )


def standard_error(clusters: Clusters) -> float:
    """The standard error of the mean over items, robust to any dependence within clusters (Liang & Zeger 1986).

    NaN for fewer than two clusters.
    """
    count = len(clusters.sizes)
    if count < 2:
        return math.nan
    residuals = clusters.sums - clusters.mean * clusters.sizes
    return float((count / (count - 1) * residuals.square().sum()).sqrt() / clusters.sizes.sum())


def studentised(clusters: Clusters, seed: int, resamples: int = RESAMPLES) -> Tensor:
    """(mean* - mean) / error* of bootstrap resamples of whole clusters, float64 [resamples] (Efron & Tibshirani 1993).

    A resample in which nothing varies, as happens where few items differ, has no error of its own and gets that of the
    sample: left out, it would make the interval too narrow.
    """
    count = len(clusters.sizes)
    times = _drawn(count, seed, resamples)
    # Counted from the mean, so that the squares below lose no precision.
    sizes, sums = clusters.sizes, clusters.sums - clusters.mean * clusters.sizes
    items = times @ sizes
    means = times @ sums / items
    whole = times @ sums.square()
    squares = whole - 2 * means * (times @ (sums * sizes)) + means.square() * (times @ sizes.square())
    errors = (count / (count - 1) * squares.clamp_min(0)).sqrt() / items
    # What is left of squares that cancel is rounding, which would make the ratio as large as it is small.
    varied = squares > 1e-10 * whole
    return means / torch.where(varied, errors, standard_error(clusters))


@functools.lru_cache(maxsize=2)  # all comparisons of a verdict use the same resamples
def _drawn(count: int, seed: int, resamples: int) -> Tensor:
    """How often each cluster is drawn in each resample, float64 [resamples, count]."""
    generator = torch.Generator().manual_seed(child_seed(seed, "paired bootstrap"))
    drawn = torch.randint(count, (resamples, count), generator=generator)
    times = torch.zeros(resamples, count, dtype=torch.float64)
    return times.scatter_add_(1, drawn, torch.ones_like(times))
