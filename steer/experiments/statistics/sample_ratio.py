"""The sample-ratio check: whether the arms got the units that their weights say.

A mismatch means that units were lost or counted wrongly in one arm, so no result of the experiment can be believed
(Fabijan et al., KDD 2019). Pearson's chi-square, at p < 0.001.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

THRESHOLD = 0.001


def mismatch_p(units: Mapping[str, int], weights: Mapping[str, float]) -> float:
    """The p-value of units per arm under the weights; 1.0 with fewer than two arms or no unit.

    Arms of weight 0 don't count.
    """
    arms = [arm for arm, weight in weights.items() if weight > 0]
    total, whole = sum(units.get(arm, 0) for arm in arms), math.fsum(weights[arm] for arm in arms)
    if len(arms) < 2 or not total:
        return 1.0
    expected = {arm: weights[arm] / whole * total for arm in arms}
    statistic = math.fsum((units.get(arm, 0) - expected[arm]) ** 2 / expected[arm] for arm in arms)
    return chi_square_tail(statistic, len(arms) - 1)


def mismatch_p_of_epochs(units: Sequence[Mapping[str, int]], weights: Sequence[Mapping[str, float]]) -> float:
    """The p-value of units per arm where each epoch has weights of its own, and expects its units by them.

    The units of all epochs are compared with the sum of what is expected, by the sum of the multinomial covariances.
    With one epoch that is `mismatch_p`.
    """
    arms = [arm for arm in weights[0] if any(each.get(arm, 0) > 0 for each in weights)] if weights else []
    if len(arms) < 2 or not any(sum(each.values()) for each in units):
        return 1.0
    counts = np.array([[each.get(arm, 0) for arm in arms] for each in units], float)
    shares = np.array([[each[arm] for arm in arms] for each in weights], float)
    totals = counts.sum(1)
    return tail_of(counts.sum(0) - totals @ shares, covariance(totals, shares))


def covariance(totals: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The covariance of the units of the arms [arms, arms], with `totals` [epochs] and `shares` [epochs, arms]."""
    return np.asarray(np.diag(totals @ shares) - (shares * totals[:, None]).T @ shares)


def tail_of(difference: np.ndarray, covariance: np.ndarray) -> float:
    """The p-value of a difference from what is expected [arms] with this covariance, in which one arm is redundant."""
    statistic = difference[1:] @ np.linalg.solve(covariance[1:, 1:], difference[1:])
    return chi_square_tail(float(statistic), len(difference) - 1)


def chi_square_tail(x: float, degrees: int) -> float:
    """P(chi-square with whole `degrees` of freedom > `x`), by finite sums (Abramowitz & Stegun 26.4.4, 26.4.5)."""
    half = x / 2
    if degrees % 2 == 0:
        term, total = 1.0, 1.0
        for i in range(1, degrees // 2):
            term *= half / i
            total += term
        return math.exp(-half) * total
    total = math.erfc(math.sqrt(half))
    term = math.sqrt(half) / math.gamma(1.5) * math.exp(-half)
    for i in range(1, (degrees - 1) // 2 + 1):
        total += term
        term *= half / (i + 0.5)
    return total
