"""A confidence sequence for bounded metrics that holds with few units too: predictable plug-in empirical Bernstein.

Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting" (JRSS B 2024, arXiv 2010.09686),
theorem 2 with the tuning of eq. 15. Nothing is asymptotic in it: it needs the values in the order in which they came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST = 0.5  # the largest stake; the paper suggests 1/2 or 3/4


class Bounds(NamedTuple):
    """An interval of a mean, or of a difference of means."""

    low: float
    high: float


def mean_sequence(values: Sequence[float], alpha: float, low: float = 0.0, high: float = 1.0) -> Bounds:
    """The interval of the mean of values in [`low`, `high`], in the order in which they came, at level 1 - `alpha`.

    Holds at every look at once. The running intersection over all looks is taken, which holds too. Raises ValueError
    for a value outside of the bounds.
    """
    x = (np.asarray(values, dtype=np.float64) - low) / (high - low)
    if x.size == 0:
        return Bounds(low, high)
    if x.min() < 0 or x.max() > 1:
        raise ValueError(f"a value lies outside of [{low:g}, {high:g}]")
    t = np.arange(1, x.size + 1)
    means = (0.5 + np.cumsum(x)) / (t + 1)
    variances = (0.25 + np.cumsum((x - means) ** 2)) / (t + 1)
    before_mean = np.concatenate([[0.5], means[:-1]])  # what was known before each value: the stake may depend on it
    before_variance = np.concatenate([[0.25], variances[:-1]])
    stakes = np.minimum(np.sqrt(2 * math.log(2 / alpha) / (before_variance * t * np.log1p(t))), MOST)
    excess = (x - before_mean) ** 2 * (-np.log1p(-stakes) - stakes)  # v * psi_E of the paper, whose 4 cancel
    total = np.cumsum(stakes)
    centre = np.cumsum(stakes * x) / total
    half = (math.log(2 / alpha) + np.cumsum(excess)) / total
    below, above = float(np.max(centre - half)), float(np.min(centre + half))
    return Bounds(low + (high - low) * max(below, 0.0), low + (high - low) * min(above, 1.0))


def difference_sequence(
    control: Sequence[float], other: Sequence[float], alpha: float, low: float = 0.0, high: float = 1.0
) -> Bounds:
    """The interval of mean(`other`) - mean(`control`): each arm's at level 1 - `alpha` / 2 (union bound)."""
    a, b = (mean_sequence(values, alpha / 2, low, high) for values in (control, other))
    return Bounds(b.low - a.high, b.high - a.low)
