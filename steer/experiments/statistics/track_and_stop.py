"""Best-arm identification: how the next units are shared among the arms, and when the best arm is known.

Track-and-stop (Garivier & Kaufmann, COLT 2016, arXiv 1602.04589) for means with a normal limit, each arm with the
variance that it has shown. It selects an arm than which no other is better by more than `epsilon`, with a probability
of error of at most `delta` at whatever moment it stops. Arms stand last: arrays are [..., arms] float64, and what comes
before are independent experiments.

The threshold is that of mixture martingales (Kaufmann & Koolen, JMLR 2021, arXiv 1811.11419) with a normal mixture,
which hold at every moment, however units are shared; those of two arms are multiplied. It is asymptotic, as variances
are estimates: nothing is concluded before every arm has `FEWEST` units.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from steer.experiments.statistics.sequences import ALPHA, FEWEST, THIN

PRIOR = 200.0  # units of an arm at which the mixture is about as precise as the arm itself
BISECTIONS = 60


class Evidence(NamedTuple):
    """How surely the leader is the best arm: the generalised likelihood ratio against each other arm [..., arms], and
    what each must exceed. At the leader they are infinite and 0."""

    leader: np.ndarray  # [...] integers
    ratios: np.ndarray
    thresholds: np.ndarray

    @property
    def decided(self) -> np.ndarray:
        """Whether every ratio is above its threshold [...]."""
        return np.asarray((self.ratios > self.thresholds).all(-1))


def optimal_weights(means: np.ndarray, variances: np.ndarray, epsilon: float) -> np.ndarray:
    """The shares of the arms with which the best one is known soonest [..., arms]; they sum to 1.

    They maximise the least ratio of the leader against another arm, (gap + epsilon)^2 / (v_best / w_best + v / w),
    which are then all equal (theorem 5 and section 2.2 of the paper). Variances are above 0, and so is epsilon.
    """
    means, variances = np.asarray(means, float), np.asarray(variances, float)
    best = _is_best(means)
    squares = (np.max(means, -1, keepdims=True) - means + epsilon) ** 2
    relative = variances / np.sum(variances * best, -1, keepdims=True)
    squares = np.where(best, np.inf, squares / np.min(np.where(best, np.inf, squares), -1, keepdims=True))
    low, high = np.zeros((*means.shape[:-1], 1)), np.ones((*means.shape[:-1], 1))
    with np.errstate(divide="ignore"):
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            above = np.sum(relative * (middle / (squares - middle)) ** 2, -1, keepdims=True) > 1
            low, high = np.where(above, low, middle), np.where(above, middle, high)
    weights = np.where(best, 1.0, relative * low / (squares - low))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def next_shares(optimal: np.ndarray, smallest: float) -> np.ndarray:
    """The optimal shares with at least `smallest` for every arm (forced exploration), which `smallest` * arms < 1
    allows: what is above it is shared as the optimum is."""
    return smallest + (1 - smallest * np.shape(optimal)[-1]) * optimal


def evidence(
    means: np.ndarray, variances: np.ndarray, counts: np.ndarray, epsilon: float, delta: float = ALPHA,
    prior: float = PRIOR,
) -> Evidence:  # fmt: skip
    """How surely the arm with the greatest mean is within `epsilon` of the best.

    The ratio against an arm is that of the likelihoods without a bound, and where that arm is better by `epsilon`. With
    N units of an arm, the mixture leaves a precision of N^2 / (N + prior) and costs log(1 + N / prior) / 2; `delta` is
    shared by the arms that may be wrong.
    """
    means, variances, counts = (np.asarray(each, float) for each in (means, variances, counts))
    best = _is_best(means)
    reach = variances * (counts + prior) / np.maximum(counts, 1) ** 2
    cost = np.log1p(counts / prior) / 2

    def leaders(values: np.ndarray) -> np.ndarray:
        return np.asarray(np.sum(values * best, -1, keepdims=True))

    gaps = leaders(means) - means + epsilon
    ratios = np.where(best, np.inf, gaps**2 / (2 * (reach + leaders(reach))))
    level = math.log((means.shape[-1] - 1) / delta)
    return Evidence(np.argmax(means, -1), ratios, np.where(best, 0.0, level + cost + leaders(cost)))


def believable_variances(variances: np.ndarray, counts: np.ndarray, informative: np.ndarray) -> np.ndarray:
    """The variances of one unit in each arm, of which those that rest on fewer than `THIN` units are at least the
    pooled one, as in `sequences.standard_error`."""
    degrees = np.maximum(counts - 1, 1)
    pooled = np.sum(variances * degrees, -1, keepdims=True) / np.sum(degrees, -1, keepdims=True)
    return np.where(informative >= THIN, variances, np.maximum(variances, pooled))


def enough(counts: np.ndarray) -> np.ndarray:
    """Whether every arm has the units without which nothing is concluded [...]."""
    return np.asarray(np.min(counts, -1) >= FEWEST)


def _is_best(means: np.ndarray) -> np.ndarray:
    """True at the arm with the greatest mean, the first of several."""
    return np.asarray(np.arange(means.shape[-1]) == np.argmax(means, -1)[..., None])
