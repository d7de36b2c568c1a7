"""Small bounds: one-sided limits of guardrails, Wilson's interval of a share, Benjamini and Hochberg's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from steer.experiments.statistics.moments import Estimate


def one_sided(control: Estimate, other: Estimate, alpha: float = 0.05) -> tuple[float, float]:
    """The lower and the upper one-sided bound of `other` - `control`, each at level 1 - `alpha`.

    A normal approximation for one look: a guardrail errs on the side of stopping, so it is not corrected for looks.
    NaN with fewer than two units in an arm.
    """
    if min(control.units, other.units) < 2:
        return math.nan, math.nan
    error = math.sqrt(control.variance / control.units + other.variance / other.units)
    estimate = other.mean - control.mean
    reach = NormalDist().inv_cdf(1 - alpha) * error
    return estimate - reach, estimate + reach


def wilson(successes: float, trials: int, alpha: float = 0.05) -> tuple[float, float]:
    """The interval of a share (Wilson 1927); (0, 1) without a trial."""
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(1 - alpha / 2)
    share = successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: those at most q are discoveries with a false-discovery rate of q (1995, step-up)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i], reverse=True)
    result = [0.0] * len(p_values)
    smallest = 1.0
    for rank, i in zip(range(len(order), 0, -1), order, strict=True):
        smallest = min(smallest, p_values[i] * len(order) / rank)
        result[i] = smallest
    return result
