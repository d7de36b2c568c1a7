"""Simulated experiments with the configuration of a file: how often the statistics err, how soon they see an effect."""

from __future__ import annotations

from typing import Any

from steer.experiments.planning import alpha_of, plan
from steer.experiments.specification import Experiment
from steer.experiments.statistics.sample_ratio import THRESHOLD
from steer.experiments.statistics.sequences import ALPHA
from steer.experiments.statistics.simulated_selection import Arms, select
from steer.experiments.statistics.simulation import Rates, simulate
from vectors.errors import UsageError

ANALYSES = 40  # interim analyses of each experiment
EXPERIMENTS = 2_000
SELECTIONS = 1_000  # experiments with adaptive weights


def selftest(experiment: Experiment, units: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Simulate experiments without a difference (A/A), and with the smallest effect of interest (A/B), as JSON values.

    The control and the arm with the smallest weight, with the metric's expected baseline or spread; `units` of both
    arms together, by default as many as the plan asks for. With adaptive weights all arms, alike or one of them better
    by that effect; `units` of all arms, by default twice as many. Raises UsageError where the file does not say enough.
    """
    planned = plan(experiment)
    if planned.units is None:
        raise UsageError(
            f"the experiment {experiment.name} can't be simulated: it has no {planned.missing}", "add it to the file"
        )
    if experiment.allocation is not None:
        return _of_selection(experiment, units or 2 * planned.units, seed)
    metric, control = experiment.metric, experiment.control
    other = min((arm for arm in experiment.arms if not arm.plain and arm.weight > 0), key=lambda arm: arm.weight)
    count = units or max(round(planned.units * (control.weight + other.weight)), 2)
    rate = (0.5 if metric.baseline is None else metric.baseline) if metric.kind == "bool" else None
    shared: dict[str, Any] = {
        "spread": metric.spread or 0.0, "rate": rate, "units": count, "looks": ANALYSES, "experiments": EXPERIMENTS,
        "alpha": alpha_of(experiment),
    }  # fmt: skip
    weights = {control.name: control.weight, other.name: other.weight}
    effect = metric.smallest_effect or 0.0
    if metric.better == "lower":
        effect = -effect
    same = simulate(weights, effect=0.0, seed=seed, **shared)
    apart = simulate(weights, effect=effect, seed=seed + 1, **shared)
    return {
        "experiment": experiment.name, "digest": experiment.digest, "arms": weights, "units": count,
        "interim_analyses": ANALYSES, "experiments": EXPERIMENTS, "level": 1 - shared["alpha"], "effect": effect,
        "same": _rates(same), "apart": _rates(apart), "sample_ratio_threshold": THRESHOLD,
        "passed": same.low <= shared["alpha"] and same.mismatched <= 5 * THRESHOLD,
    }  # fmt: skip


def _of_selection(experiment: Experiment, units: int, seed: int) -> dict[str, Any]:
    """Experiments whose weights follow the metric, as JSON values; the better arm is the first besides the control."""
    metric, allocation = experiment.metric, experiment.allocation
    assert allocation is not None
    effect = metric.smallest_effect or 0.0
    base = (0.5 if metric.baseline is None else metric.baseline) if metric.kind == "bool" else 0.0
    weights = tuple(arm.weight for arm in experiment.arms)
    better = next(number for number, arm in enumerate(experiment.arms) if not arm.plain)
    # The better rate stays a rate, and which direction is better does not matter to the rule.
    sign = -1.0 if metric.kind == "bool" and base + effect > 1 else 1.0
    found: dict[str, dict[str, Any]] = {}
    for number, (name, gain) in enumerate((("same", 0.0), ("apart", sign * effect))):
        means = tuple(base + gain * (arm == better if sign > 0 else arm != better) for arm in range(len(weights)))
        rates = select(
            Arms(means, None if metric.kind == "bool" else metric.spread, weights), epsilon=effect, units=units,
            smallest_share=allocation.smallest_share, looks=ANALYSES, experiments=SELECTIONS, seed=seed + number,
        )  # fmt: skip
        found[name] = {
            "decided": rates.decided, "wrong": rates.wrong, "low": rates.low, "high": rates.high,
            "median_units": rates.median_units if rates.decided else None, "mismatched": rates.mismatched,
        }  # fmt: skip
    return {
        "experiment": experiment.name, "digest": experiment.digest, "method": allocation.method,
        "arms": {arm.name: arm.weight for arm in experiment.arms}, "units": units, "interim_analyses": ANALYSES,
        "experiments": SELECTIONS, "error_rate": ALPHA, "effect": effect, **found,
        "sample_ratio_threshold": THRESHOLD,
        "passed": found["apart"]["low"] <= ALPHA and all(each["mismatched"] <= 0.01 for each in found.values()),
    }  # fmt: skip


def _rates(rates: Rates) -> dict[str, Any]:
    return {
        "significant": rates.significant, "low": rates.low, "high": rates.high, "covered": rates.covered,
        "median_units": rates.median_units if rates.significant else None, "mismatched": rates.mismatched,
    }  # fmt: skip
