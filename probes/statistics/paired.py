"""Paired differences: two arms on the same items, and an arm against a family of arms that were drawn at random.

Arms on the same items are compared by the interval of their difference, never by whether two intervals overlap.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.intervals import CONFIDENCE
from probes.statistics.clusters import clusters_of, standard_error, studentised

POWER = 0.8


class Difference(NamedTuple):
    """The mean difference, its 95 % interval, a two-sided p-value, and its standard error.

    `detectable` is the smallest true difference that the same test would find with 80 % probability, at the level of
    its interval: what the test takes, and Student's quantile of that power, in units of the error (Bloom 1995). It is
    NaN where the error is 0, which says nothing of how another difference would vary.
    """

    mean: float
    low: float
    high: float
    p: float
    error: float
    detectable: float
    items: int
    clusters: int


def difference(
    differences: Tensor, groups: Sequence[str] | None = None, *, seed: int = 0, confidence: float = CONFIDENCE
) -> Difference:
    """The mean of paired differences [items], by the symmetric studentised bootstrap (Hall 1988) and Student's t, over
    whole groups: the interval is the wider and the p-value the greater of the two.

    Where one or two items differ, resamples hold few values, and their quantile is far too narrow: with one of 31 it
    is 1.2 standard errors at 98 %. Where differences are skewed, Student's t is too narrow. The p-value is below
    1 - confidence exactly where the interval holds no zero.

    Where all differences are equal there is nothing to resample: the interval has no width, and the p-value is that of
    the sign test, or 1 where they are zero. Of fewer than six items, the two then need not agree.
    """
    return against_draws(differences, torch.zeros(1, len(differences)), groups, seed=seed, confidence=confidence)


def against_draws(
    values: Tensor, draws: Tensor, groups: Sequence[str] | None = None, *, seed: int = 0, confidence: float = CONFIDENCE
) -> Difference:
    """The difference of an arm [items] from arms drawn at random [draws, items], as if the arm were one more draw.

    Two questions, both of which must be answered yes: would other items show it (the studentised bootstrap of the
    difference from the draws' mean, over whole groups), and would one more draw not (Student's t for one more draw
    beside the mean of k, on these items: a prediction interval). The interval is the wider and the p-value the greater
    of the two, so that the chance of a false finding is as stated whichever answer is no (an intersection-union test,
    Berger 1982). The two errors do not add up: how far the draws' means lie apart on these items holds what the items
    contribute. With a single draw the comparison is with that very arm, and only the items' error counts.
    """
    differences = values.double() - draws.double().mean(0)
    clusters = clusters_of(differences, groups)
    count, mean, error = len(clusters.sizes), clusters.mean, standard_error(clusters)
    between = 0.0
    if len(draws) > 1:
        between = float(draws.double().mean(1).std()) * math.sqrt(1 + 1 / len(draws))
    if math.isnan(error):
        return Difference(mean, -math.inf, math.inf, 1.0, math.nan, math.inf, len(values), count)
    greater = max(error, between)
    if error <= 1e-12 * max(1.0, abs(mean)):
        error = 0.0
    if error == 0 and between == 0:
        sign_test = 1.0 if abs(mean) <= 1e-12 else min(1.0, 2.0 ** (1 - count))
        return Difference(mean, mean, mean, sign_test, 0.0, math.nan, len(values), count)
    half = p = detectable = 0.0
    if error > 0:
        half, p = _resampled(error * studentised(clusters, seed), mean, confidence)
        half = max(half, error * student_quantile(confidence, count - 1))
        p = max(p, student_two_sided(mean / error, count - 1))
        detectable = half + error * student_quantile(2 * POWER - 1, count - 1)
    if between > 0:
        of_draws = between * student_quantile(confidence, len(draws) - 1)
        half = max(half, of_draws)
        detectable = max(detectable, of_draws + between * student_quantile(2 * POWER - 1, len(draws) - 1))
        p = max(p, student_two_sided(mean / between, len(draws) - 1))
    return Difference(mean, mean - half, mean + half, p, greater, detectable, len(values), count)


def _resampled(reach: Tensor, mean: float, confidence: float) -> tuple[float, float]:
    """The half width of the interval, and the p-value, by the distances of resampled means from the mean [resamples].

    Both by one rule, counted: the width is the distance that as many resamples reach as make a p-value of at least
    1 - confidence. It is infinite where there are too few resamples for that level.
    """
    # Up to rounding, which must not decide whether a resample counts as one that reaches the mean.
    reach, whole = reach.abs() * (1 + 1e-9), 1 + len(reach)
    p = (1 + int((reach >= abs(mean)).sum())) / whole
    most = _most(confidence, whole)
    return (float(reach.topk(most).values[-1]) if most else math.inf), p


@functools.lru_cache(maxsize=64)
def _most(confidence: float, whole: int) -> int:
    """The greatest number of resamples that give a p-value below 1 - confidence, the data counted as one of them."""
    return sum(count / whole < 1 - confidence for count in range(1, whole))


def student_two_sided(value: float, degrees: int) -> float:
    """The probability that Student's t lies farther from 0 than `value`, by its finite sum (Abramowitz & Stegun 26.7.3
    and 26.7.4)."""
    angle = math.atan2(abs(value), math.sqrt(degrees))
    square = math.cos(angle) ** 2
    term, total = (math.cos(angle), 0.0) if degrees % 2 else (1.0, 0.0)
    for index in range(3 if degrees % 2 else 2, degrees + 1, 2):
        total += term
        term *= square * (index - 1) / index
    inside = math.sin(angle) * total
    if degrees % 2:
        inside = (angle + inside) * 2 / math.pi
    return max(0.0, 1 - inside)


@functools.lru_cache(maxsize=64)
def student_quantile(confidence: float, degrees: int) -> float:
    """What Student's t stays within, on both sides of 0, with this probability; by bisection over its angle."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        outside = student_two_sided(math.sqrt(degrees) * math.tan(middle), degrees)
        low, high = (middle, high) if outside > 1 - confidence else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def normal_quantile(probability: float) -> float:
    """The standard normal quantile."""
    return float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))
