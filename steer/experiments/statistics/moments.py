"""What the statistics read of an arm: sums over units, which a database adds up, and the estimate that follows.

The unit of analysis is the unit of assignment: the responses of one conversation are not independent, so they are
first added up to one value per unit. A metric is the mean of that value, or the ratio of two such values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Sums(NamedTuple):
    """Sums over the `units` of an arm: of a value y, and of a second value x (a denominator or a covariate)."""

    units: int
    y: float
    yy: float
    x: float = 0.0
    xx: float = 0.0
    xy: float = 0.0


class Estimate(NamedTuple):
    """A mean (or ratio of means) over `units` units, and the variance of one unit's contribution to it.

    The standard error of the mean is sqrt(variance / units). Both are NaN where there are too few units. `informative`
    is the number of units that the variance rests on: of a yes or no the rarer answers, else Kish's effective sample
    size, (sum of y)^2 / (sum of y^2). A variance that rests on a handful of units may be far too small.
    """

    units: int
    mean: float
    variance: float
    informative: float = math.inf


def sums_of(y: Sequence[float], x: Sequence[float] = ()) -> Sums:
    """The sums of one value per unit; `x`, where given, has one for each `y`."""
    if not x:
        return Sums(len(y), math.fsum(y), math.fsum(v * v for v in y))
    pairs = list(zip(y, x, strict=True))
    return Sums(
        len(y), math.fsum(y), math.fsum(v * v for v in y), math.fsum(x), math.fsum(v * v for v in x),
        math.fsum(a * b for a, b in pairs),
    )  # fmt: skip


def added(a: Sums, b: Sums) -> Sums:
    """The sums over the units of both."""
    return Sums(*(left + right for left, right in zip(a, b, strict=True)))  # type: ignore[arg-type]


def mean(arm: Sums) -> Estimate:
    """The mean of y, and its variance with Bessel's correction."""
    if arm.units < 2:
        return Estimate(arm.units, arm.y / arm.units if arm.units else math.nan, math.nan, 0.0)
    return Estimate(arm.units, arm.y / arm.units, _variance(arm.units, arm.y, arm.yy), _informative(arm))


def ratio(arm: Sums) -> Estimate:
    """The ratio sum(y) / sum(x), with its variance by the delta method (Deng, Knoblich & Lu 2018, eq. 3)."""
    if arm.x == 0:
        return Estimate(arm.units, math.nan, math.nan)
    value = arm.y / arm.x
    if arm.units < 2:
        return Estimate(arm.units, value, math.nan)
    n, mean_x = arm.units, arm.x / arm.units
    spread = (
        _variance(n, arm.y, arm.yy) - 2 * value * _covariance(arm) + value**2 * _variance(n, arm.x, arm.xx)
    ) / mean_x**2
    return Estimate(n, value, max(spread, 0.0), _informative(arm))


def covariate_slope(arms: Sequence[Sums]) -> float:
    """The slope of y on the covariate x within the arms, pooled (CUPED; Deng et al. 2013, eq. 4); 0 if x is constant.

    Within the arms, so that a difference between them does not leak into the slope.
    """
    shared = [arm for arm in arms if arm.units > 1]
    products = math.fsum((arm.units - 1) * _covariance(arm) for arm in shared)
    squares = math.fsum((arm.units - 1) * _variance(arm.units, arm.x, arm.xx) for arm in shared)
    return products / squares if squares > 0 else 0.0


def adjusted(arm: Sums, slope: float, covariate_mean: float) -> Estimate:
    """The mean of y - slope * (x - covariate_mean): the same in expectation, with less variance (CUPED).

    `covariate_mean` is that of all arms together, so that every arm is moved to the same covariate.
    """
    plain = mean(arm)
    if arm.units < 2:
        return plain
    variance = plain.variance + slope**2 * _variance(arm.units, arm.x, arm.xx) - 2 * slope * _covariance(arm)
    return plain._replace(mean=plain.mean - slope * (arm.x / arm.units - covariate_mean), variance=max(variance, 0.0))


def _variance(n: int, total: float, squares: float) -> float:
    return max((squares - total**2 / n) / (n - 1), 0.0)


def _covariance(arm: Sums) -> float:
    return (arm.xy - arm.x * arm.y / arm.units) / (arm.units - 1)


def _informative(arm: Sums) -> float:
    if arm.y == arm.yy:  # zeros and ones
        return min(arm.y, arm.units - arm.y)
    return arm.y**2 / arm.yy if arm.yy else 0.0
