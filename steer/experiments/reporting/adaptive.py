"""The report of an experiment with adaptive weights: which arm is selected. It is a selection, not an estimation.

Weights that follow the results bias what a fixed allocation would estimate, so there is no verdict about effects. The
means of arms have intervals that hold however units are shared: those of each arm at every number of its own units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steer.experiments.reporting.comparing import NONE, Comparison
from steer.experiments.running import allocating
from steer.experiments.specification import Experiment, Metric
from steer.experiments.statistics.moments import Estimate
from steer.experiments.statistics.sequences import ALPHA, FEWEST, TUNED_AT, Difference, half_width
from steer.experiments.statistics.track_and_stop import believable_variances
from steer.experiments.storage.epochs import Epoch
from steer.experiments.storage.figures import BUCKETS, EMPTY, Analysis, estimate_of, total

LABEL = "selection, not estimation"
OF_EACH_ARM = "confidence sequence of each arm"


def compare(analysis: Analysis, metric: Metric, control: str, others: Sequence[str]) -> Comparison:
    """A metric in every arm, with intervals that all hold at once at level 1 - `ALPHA`. Raises SQLAlchemyError.

    The interval of a difference is what those of the two arms leave; there is no p-value.
    """
    arms, added_up = (control, *others), analysis.slices(metric)
    slices = {arm: added_up.get(arm, [EMPTY] * BUCKETS) for arm in arms}
    estimates = {arm: estimate_of(metric, total(slices[arm])) for arm in arms}
    bounds = intervals(estimates)
    differences = {}
    for arm in others:
        low, high = bounds[arm][0] - bounds[control][1], bounds[arm][1] - bounds[control][0]
        differences[arm] = Difference(
            estimates[arm].mean - estimates[control].mean, low, high, math.nan,
            estimates[arm].units + estimates[control].units, math.nan,
        )  # fmt: skip
    kinds = {arm: NONE if math.isnan(found.low) else OF_EACH_ARM for arm, found in differences.items()}
    return Comparison(metric, estimates, differences, kinds, 0.0, slices, bounds)


def intervals(estimates: Mapping[str, Estimate]) -> dict[str, tuple[float, float]]:
    """The interval of each arm's mean at every moment, all at once; NaN below `FEWEST` units, or without variance.

    The asymptotic confidence sequence (`sequences.half_width`) in the number of the arm's own units, as values of one
    arm come in an order that the weights do not change.
    """
    columns = np.array([(each.variance, each.units, each.informative) for each in estimates.values()], float).T
    variances = believable_variances(*columns)
    found = {}
    for (arm, each), variance in zip(estimates.items(), variances.tolist(), strict=True):
        half = math.nan
        if each.units >= FEWEST and variance > 0:
            arms = len(estimates)
            half = half_width(math.sqrt(variance / each.units), each.units, ALPHA / arms, TUNED_AT / arms)
        found[arm] = each.mean - half, each.mean + half
    return found


def selection(
    analysis: Analysis, experiment: Experiment, epochs: Sequence[Epoch], unhealthy: Sequence[str],
    outside: Mapping[str, Sequence[str]],
) -> dict[str, Any]:  # fmt: skip
    """The block about the selection as JSON values. Raises SQLAlchemyError.

    An arm that the log has as selected stays that: the first time that the evidence suffices counts. `outside` are the
    guardrails that an arm is surely outside of.
    """
    allocation = experiment.allocation
    assert allocation is not None
    now = allocating.finding(experiment, allocating.estimates(analysis, experiment))
    noted = next((epoch for epoch in epochs if epoch.selected), None)
    selected = noted.selected if noted is not None else now.leader if now.selected else ""
    state, reason = ("selected" if selected else "not decided"), (noted.reason if noted is not None else now.reason)
    if unhealthy:
        state, reason, selected = "unhealthy", "; ".join(unhealthy), ""
    elif outside.get(selected):
        state, reason = "breached", f"{selected} would be selected; guardrail breached: {', '.join(outside[selected])}"
    units = analysis.by_epoch()
    every = [allocating.file_weights(experiment), *epochs]
    return {
        "label": LABEL, "method": allocation.method, "smallest_share": allocation.smallest_share,
        "every": allocation.every, "smallest_effect": experiment.metric.smallest_effect, "error_rate": ALPHA,
        "state": state, "selected": selected or None, "leader": now.leader or None, "reason": reason,
        "against": {} if unhealthy else {arm: each._asdict() for arm, each in now.against.items()},
        "epochs": [{"epoch": each.number, "weights": dict(each.weights), "reason": each.reason, "at": each.at or None,
                    "selected": each.selected or None, "units": units.get(each.number, {})} for each in every],
    }  # fmt: skip
