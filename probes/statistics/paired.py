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
from probes.seeds import child_seed
from probes.statistics.clusters import RESAMPLES, clusters_of, standard_error, studentised

POWER = 0.8


class Difference(NamedTuple):
    """The mean difference, its 95 % interval, a two-sided p-value, and its standard error.

    `detectable` is the smallest true difference that so many items would show with 80 % probability (Cohen 1988).
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
    """The mean of paired differences [items], by the symmetric studentised bootstrap (Hall 1988), over whole groups.

    Where all differences are equal there is nothing to resample: the interval has no width, and the p-value is that of
    the sign test, or 1 where they are zero.
    """
    return against_draws(differences, torch.zeros(1, len(differences)), groups, seed=seed, confidence=confidence)


def against_draws(
    values: Tensor, draws: Tensor, groups: Sequence[str] | None = None, *, seed: int = 0, confidence: float = CONFIDENCE
) -> Difference:
    """The difference of an arm [items] from arms drawn at random [draws, items], as if the arm were one more draw.

    Two errors add up: that of the items, by the studentised bootstrap over whole groups, and that of the draws, which
    is Student's t for one more draw beside the mean of k (a prediction interval). With a single draw the comparison is
    with that very arm, and only the items' error counts.
    """
    differences = values.double() - draws.double().mean(0)
    clusters = clusters_of(differences, groups)
    count, mean, error = len(clusters.sizes), clusters.mean, standard_error(clusters)
    between = 0.0
    if len(draws) > 1:
        between = float(draws.double().mean(1).std()) * math.sqrt(1 + 1 / len(draws))
    total = math.hypot(error, between)
    if math.isnan(error):
        return Difference(mean, -math.inf, math.inf, 1.0, math.nan, math.inf, len(values), count)
    detectable = (normal_quantile((1 + confidence) / 2) + normal_quantile(POWER)) * total
    if error <= 1e-12 * max(1.0, abs(mean)):
        error = 0.0
    if error == 0 and between == 0:
        sign_test = 1.0 if abs(mean) <= 1e-12 else min(1.0, 2.0 ** (1 - count))
        return Difference(mean, mean, mean, sign_test, 0.0, 0.0, len(values), count)
    errors = torch.zeros(1, dtype=torch.float64)
    if error > 0:
        errors = error * studentised(clusters, seed)
    if between > 0:
        parts = between * student(len(draws) - 1, RESAMPLES, seed)
        errors = parts if len(errors) == 1 else parts[: len(errors)] + errors
    reach = errors.abs()
    half = float(reach.quantile(confidence))
    p = (1 + int((reach >= abs(mean)).sum())) / (1 + len(reach))
    return Difference(mean, mean - half, mean + half, p, total, detectable, len(values), count)


@functools.lru_cache(maxsize=8)
def student(degrees: int, count: int, seed: int) -> Tensor:
    """`count` draws of Student's t, float64."""
    generator = torch.Generator().manual_seed(child_seed(seed, "student", degrees))
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    squares = torch.randn(count, degrees, generator=generator, dtype=torch.float64).square().mean(1)
    return normal / squares.sqrt()


def normal_quantile(probability: float) -> float:
    """The standard normal quantile."""
    return float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))
