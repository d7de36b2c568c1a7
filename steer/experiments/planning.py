"""How many units an experiment will need, from the effect that matters and what is expected of the control."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from steer.experiments.specification import Experiment, Metric
from steer.experiments.statistics import track_and_stop
from steer.experiments.statistics.sequences import ALPHA, FEWEST, half_width

POWER = 0.8
MOST = 10**12


class Plan(NamedTuple):
    """The units of all arms together at which the difference that matters is seen with probability `POWER`.

    `units` is None where the file does not say enough; `missing` names what is missing.
    """

    units: int | None
    missing: str = ""


def compared_arms(experiment: Experiment) -> list[str]:
    """The arms that are compared with the control."""
    return [arm.name for arm in experiment.arms if arm.name != experiment.control.name and arm.weight > 0]


def alpha_of(experiment: Experiment) -> float:
    """The level of one arm's interval: that of the experiment, divided by the arms that are compared (Bonferroni)."""
    return ALPHA / max(len(compared_arms(experiment)), 1)


def plan(experiment: Experiment) -> Plan:
    """The number of units for the arm with the smallest weight against the control.

    A difference of the size of the smallest effect is seen when the confidence sequence excludes zero: its half width
    at n units, and the standard error times the normal quantile of the power, must together be at most the effect.
    With adaptive weights, the units after which an arm is selected that is better than all others by the effect.
    """
    metric = experiment.metric
    if metric.smallest_effect is None:
        return Plan(None, "metric.smallest_effect")
    variance = _variance(metric)
    if variance is None:
        return Plan(None, "metric.spread, the expected standard deviation")
    if experiment.allocation is not None:
        return Plan(_units_of_selection(experiment, metric.smallest_effect, variance))
    others = [arm.weight for arm in experiment.arms if not arm.plain and arm.weight > 0]
    both = experiment.control.weight + min(others, default=0.0)
    if not others or experiment.control.weight <= 0:
        return Plan(None, "a weight of the control and of another arm")
    spread = math.sqrt(variance * both * (1 / experiment.control.weight + 1 / min(others)))
    effect = metric.smallest_effect
    alpha = alpha_of(experiment)
    needed = _first(lambda units: _reach(spread, units, alpha) <= effect, 2)
    needed = max(needed, math.ceil(FEWEST * both / min(experiment.control.weight, *others)))
    return Plan(math.ceil(needed / both))


def _variance(metric: Metric) -> float | None:
    """The variance that is expected of one unit; None where the file does not say enough."""
    if metric.kind == "bool":
        share = min(max(0.5 if metric.baseline is None else metric.baseline, 0.01), 0.99)
        return share * (1 - share)
    return None if metric.spread is None else metric.spread**2


def _units_of_selection(experiment: Experiment, effect: float, variance: float) -> int:
    """The units after which an adaptive allocation selects an arm that is better than every other by `effect`, where
    the arms have the optimal shares from the beginning, and show what they are."""
    assert experiment.allocation is not None
    arms = len(experiment.arms)
    means, variances = np.where(np.arange(arms) == 0, effect, 0.0), np.full(arms, variance)
    optimal = track_and_stop.optimal_weights(means, variances, effect)
    shares = track_and_stop.next_shares(optimal, experiment.allocation.smallest_share)

    def decided(units: int) -> bool:
        return bool(track_and_stop.evidence(means, variances, shares * units, effect).decided)

    return max(_first(decided, 2), FEWEST * arms)


def _reach(spread: float, units: int, alpha: float) -> float:
    error = spread / math.sqrt(units)
    return half_width(error, units, alpha) + NormalDist().inv_cdf(POWER) * error


def _first(enough: Callable[[int], bool], low: int) -> int:
    """The smallest whole number from `low` on for which `enough` is true, which it stays."""
    high = low
    while not enough(high) and high < MOST:
        high *= 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
