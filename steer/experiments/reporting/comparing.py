"""One metric of an experiment, compared between the control and every other arm."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from steer.experiments.specification import Metric
from steer.experiments.statistics import bounded, moments
from steer.experiments.statistics.moments import Estimate, Sums, added
from steer.experiments.statistics.sequences import FEWEST, Difference, difference
from steer.experiments.storage.figures import BUCKETS, EMPTY, Analysis, estimate_of, total

COVERED = 0.5  # share of the units that must have a covariate for it to be used
SEQUENCE, BOUNDED, NONE = "asymptotic confidence sequence", "empirical Bernstein confidence sequence", "none yet"


class Comparison(NamedTuple):
    """A metric in every arm, the differences from the control by arm, and how the differences came to be.

    `intervals` says by arm which sequence the interval is of. `adjusted` is the share of variance that the covariate
    has removed (CUPED), 0 where there is none. `slices` has the sums of each slice of time, by arm;
    `bounds` the intervals of the means, with adaptive weights.
    """

    metric: Metric
    estimates: Mapping[str, Estimate]
    differences: Mapping[str, Difference]
    intervals: Mapping[str, str]
    adjusted: float
    slices: Mapping[str, Sequence[Sums]]
    bounds: Mapping[str, tuple[float, float]] | None = None


def compare_all(
    analysis: Analysis, metrics: Sequence[Metric], control: str, others: Sequence[str], alpha: float
) -> list[Comparison]:
    """`compare` for several metrics. Raises SQLAlchemyError."""
    before = analysis.before([metric for metric in metrics if metric.source == "server" and metric.per == "unit"])
    return [compare(analysis, metric, control, others, alpha, before.get(metric.name)) for metric in metrics]


def compare(
    analysis: Analysis, metric: Metric, control: str, others: Sequence[str], alpha: float,
    before: Mapping[str, Sums] | None = None,
) -> Comparison:  # fmt: skip
    """Compare arms with the control at level 1 - `alpha` each. Raises SQLAlchemyError.

    `before` are the sums of the units that had answers before they entered, by arm (`Analysis.before`).
    """
    added_up = analysis.slices(metric)
    slices = {arm: added_up.get(arm, [EMPTY] * BUCKETS) for arm in (control, *others)}
    sums = {arm: total(each) for arm, each in slices.items()}
    estimates = {arm: estimate_of(metric, each) for arm, each in sums.items()}
    adjusted, saved = _with_covariate(before or {}, sums, estimates)
    differences, intervals = {}, {}
    for arm in others:
        found, kind = difference(adjusted[control], adjusted[arm], alpha=alpha), SEQUENCE
        few = min(estimates[control].units, estimates[arm].units) < FEWEST
        if few and metric.bounds and metric.per == "unit" and min(estimates[control].units, estimates[arm].units):
            found, kind = _with_few(analysis, metric, control, arm, alpha, found), BOUNDED
        differences[arm], intervals[arm] = found, NONE if math.isnan(found.low) else kind
    return Comparison(metric, estimates, differences, intervals, saved, slices)


def over_time(compared: Comparison, analysis: Analysis, control: str, arm: str, alpha: float) -> list[dict[str, Any]]:
    """The difference after each slice of time, of the units that had entered by then; without CUPED."""
    width = (analysis.entered - analysis.began) / len(compared.slices[control])
    points = []
    both = zip(_growing(compared.slices[control]), _growing(compared.slices[arm]), strict=True)
    for number, (first, second) in enumerate(both, 1):
        found = difference(
            estimate_of(compared.metric, first), estimate_of(compared.metric, second), alpha=alpha
        )  # fmt: skip
        if not math.isnan(found.low):
            at = analysis.began + number * width
            points.append({"at": at, "units": found.units, "estimate": found.estimate, "low": found.low,
                           "high": found.high})  # fmt: skip
    return points


def _growing(slices: Sequence[Sums]) -> Iterator[Sums]:
    return itertools.accumulate(slices, added)


def _with_covariate(
    before: Mapping[str, Sums], sums: Mapping[str, Sums], estimates: Mapping[str, Estimate]
) -> tuple[Mapping[str, Estimate], float]:
    """The estimates with less variance, where most units had answers before they entered, and the share removed.

    CUPED (Deng et al. 2013). Before a unit enters, while the coverage grows, it is served as the control, whatever its
    arm will be. A unit without answers before counts as one with the mean covariate.
    """
    known = sum(each.units for each in before.values())
    if known < COVERED * sum(each.units for each in sums.values()) or known < FEWEST:
        return estimates, 0.0
    centre = math.fsum(each.x for each in before.values()) / known
    filled = {arm: _filled(each, before.get(arm, EMPTY), centre) for arm, each in sums.items()}
    slope = moments.covariate_slope(list(filled.values()))
    whole = math.fsum(each.x for each in filled.values()) / sum(each.units for each in filled.values())
    found = {arm: moments.adjusted(each, slope, whole) for arm, each in filled.items()}
    left = [found[arm].variance / estimates[arm].variance for arm in found if estimates[arm].variance > 0]
    return found, 1 - sum(left) / len(left) if left else 0.0


def _filled(everyone: Sums, known: Sums, centre: float) -> Sums:
    """The sums of an arm with the covariate `centre` for the units that have none."""
    missing, y = everyone.units - known.units, everyone.y - known.y
    return Sums(
        everyone.units, everyone.y, everyone.yy, known.x + missing * centre, known.xx + missing * centre**2,
        known.xy + y * centre,
    )  # fmt: skip


def _with_few(
    analysis: Analysis, metric: Metric, control: str, arm: str, alpha: float, found: Difference
) -> Difference:
    """The interval of a bounded metric with few units, and the least level at which it excludes no difference."""
    low, high = metric.bounds or (0.0, 1.0)
    first, second = (analysis.first_values(metric, each, 2 * FEWEST * FEWEST) for each in (control, arm))
    try:
        bounds = bounded.difference_sequence(first, second, alpha, low, high)
    except ValueError:  # a value outside of the bounds that the file states
        return found

    def excludes(level: float) -> bool:
        at = bounded.difference_sequence(first, second, level, low, high)
        return at.low > 0 or at.high < 0

    lowest, highest = 1e-12, 1.0
    if not excludes(highest):
        p = 1.0
    else:
        for _ in range(50):
            middle = math.sqrt(lowest * highest)
            lowest, highest = (lowest, middle) if excludes(middle) else (middle, highest)
        p = highest
    return found._replace(low=bounds.low, high=bounds.high, p=p)
