"""Adaptive weights: what the log's sums say about the best arm, and which epoch follows from it.

Only what a fixed allocation counts is read, so neither the ramp nor forced arms. Units are compared by the mean of
their answers so far; those of a metric per response by the ratio of sums, with its variance by the delta method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from sqlalchemy import Engine

from steer.experiments.specification import Experiment
from steer.experiments.statistics import track_and_stop
from steer.experiments.statistics.moments import Estimate
from steer.experiments.statistics.sample_ratio import THRESHOLD, mismatch_p_of_epochs
from steer.experiments.statistics.sequences import ALPHA, FEWEST
from steer.experiments.storage.epochs import Epoch, epochs_of
from steer.experiments.storage.figures import Analysis, analysis, estimate_of, total

LEAST_CHANGE = 0.02  # of a weight, for which an epoch is begun


class Against(NamedTuple):
    """The evidence that the leader is not worse than another arm by the smallest effect, and what it must exceed."""

    evidence: float
    threshold: float


class Finding(NamedTuple):
    """What is known of the best arm: the leader (empty while too little is known), whether it is selected, why, and the
    weights that would let it be known soonest."""

    leader: str
    selected: bool
    reason: str
    weights: Mapping[str, float]
    against: Mapping[str, Against]


def file_weights(experiment: Experiment) -> Epoch:
    """Epoch 0."""
    return Epoch(0, {arm.name: arm.weight for arm in experiment.arms})


def estimates(found: Analysis, experiment: Experiment) -> dict[str, Estimate]:
    """The primary metric in every arm. Raises SQLAlchemyError."""
    slices = found.slices(experiment.metric)
    return {
        arm.name: estimate_of(experiment.metric, total(slices.get(arm.name, ()))) for arm in experiment.arms
    }  # fmt: skip


def finding(experiment: Experiment, known: Mapping[str, Estimate]) -> Finding:
    """Which arm is best, as far as these estimates of every arm say. The experiment is an adaptive one."""
    names, allocation = list(known), experiment.allocation
    assert allocation is not None
    start, effect = file_weights(experiment).weights, experiment.metric.smallest_effect or 0.0
    counts = np.array([known[name].units for name in names], float)
    if not track_and_stop.enough(counts):
        few = ", ".join(name for name in names if known[name].units < FEWEST)
        return Finding("", False, f"fewer than {FEWEST} units in {few}", start, {})
    sign = 1.0 if experiment.metric.better == "higher" else -1.0
    means = sign * np.array([known[name].mean for name in names])
    variances = track_and_stop.believable_variances(
        np.array([known[name].variance for name in names]), counts,
        np.array([known[name].informative for name in names]),
    )  # fmt: skip
    if not (variances > 0).all():
        return Finding("", False, "the metric has not varied yet", start, {})
    found = track_and_stop.evidence(means, variances, counts, effect)
    leader = names[int(found.leader)]
    against = {
        name: Against(float(ratio), float(threshold))
        for name, ratio, threshold in zip(names, found.ratios, found.thresholds, strict=True) if name != leader
    }  # fmt: skip
    if found.decided:
        optimal = np.array([float(name == leader) for name in names])
        reason = (
            f"{leader} is selected: no arm is better by more than {effect:g}, with a probability of error of at most "
            f"{ALPHA:g}"
        )
    else:
        optimal = track_and_stop.optimal_weights(means, variances, effect)
        rival = min(against, key=lambda name: against[name].evidence - against[name].threshold)
        reason = (
            f"{leader} leads; the evidence against {rival} is {against[rival].evidence:.3g} of the "
            f"{against[rival].threshold:.3g} needed"
        )
    shares = track_and_stop.next_shares(optimal, allocation.smallest_share)
    weights = _rounded(dict(zip(names, shares.tolist(), strict=True)))
    return Finding(leader, bool(found.decided), reason, weights, against)


def shares_p(found: Analysis, experiment: Experiment, epochs: Sequence[Epoch]) -> float:
    """The p-value of the arms' shares under the weights of the epochs in which the units got their arms."""
    weights = {epoch.number: epoch.weights for epoch in (file_weights(experiment), *epochs)}
    units = {number: each for number, each in found.by_epoch().items() if number in weights}
    return mismatch_p_of_epochs(list(units.values()), [weights[number] for number in units])


def following(engine: Engine, experiment: Experiment, version: int) -> Epoch | None:
    """The epoch that should begin now; None where the weights stay as they are: little has changed, an arm is selected,
    or the shares of the arms are wrong. Raises SQLAlchemyError."""
    epochs = epochs_of(engine, experiment.name, version)
    last = epochs[-1] if epochs else file_weights(experiment)
    if last.selected:
        return None
    with analysis(engine, experiment.name, version) as found:
        known = estimates(found, experiment)
        now = finding(experiment, known)
        if not now.leader or shares_p(found, experiment, epochs) < THRESHOLD:
            return None
    change = max(abs(weight - last.weights[name]) for name, weight in now.weights.items())
    if not now.selected and change < LEAST_CHANGE:
        return None
    return Epoch(last.number + 1, now.weights, now.reason, now.leader if now.selected else "")


def _rounded(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights of four decimals that sum to 1."""
    rounded = {name: round(weight, 4) for name, weight in weights.items()}
    greatest = max(rounded, key=lambda name: rounded[name])
    rounded[greatest] = round(1 - sum(weight for name, weight in rounded.items() if name != greatest), 4)
    return rounded
