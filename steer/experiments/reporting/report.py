"""The report of an experiment as JSON values: health, units, comparisons, guardrails, decisions, the course over time.

Answers during the ramp, forced ones, those of units outside of the coverage, and units that were seen in two arms are
no part of any comparison. Where the shares of the arms are not those of the file, no comparison is given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Engine

from steer.experiments.overview import counts, described
from steer.experiments.planning import alpha_of, compared_arms, plan
from steer.experiments.reporting import adaptive
from steer.experiments.reporting.comparing import Comparison, compare_all, over_time
from steer.experiments.reporting.texts import conversations
from steer.experiments.running import allocating, guardrails
from steer.experiments.specification import GUARDRAILS, Experiment, Metric
from steer.experiments.statistics.bounds import benjamini_hochberg
from steer.experiments.statistics.decision import Decision, decide
from steer.experiments.statistics.moments import added
from steer.experiments.statistics.sample_ratio import THRESHOLD, mismatch_p
from steer.experiments.statistics.sequences import ALPHA, FEWEST, Difference
from steer.experiments.storage.epochs import epochs_of
from steer.experiments.storage.figures import Analysis, analysis
from vectors.storage.files import digest_json, readable_json

FORMAT = "steer.experiment-report/1"


def report(engine: Engine, experiment: Experiment, version: int) -> dict[str, Any]:
    """The report of one version as JSON values; None stands for what cannot be said yet. Raises SQLAlchemyError."""
    state = described(engine, experiment.name, version)
    control, others, alpha = experiment.control.name, compared_arms(experiment), alpha_of(experiment)
    adapts, selection = experiment.allocation is not None, None
    epochs = epochs_of(engine, experiment.name, version) if adapts else []
    with analysis(engine, experiment.name, version) as found:
        weights = {arm.name: arm.weight for arm in experiment.arms}
        p = allocating.shares_p(found, experiment, epochs) if adapts else mismatch_p(found.units.by_arm, weights)
        wanted = "epochs" if adapts else "file"
        unhealthy = [f"the shares of the arms are not those of the {wanted} (p = {p:.2g})"] if p < THRESHOLD else []
        compared: Sequence[Comparison] = []
        if not unhealthy and adapts:
            compared = [adaptive.compare(found, metric, control, others) for metric in _metrics(experiment)]
        elif not unhealthy:
            compared = compare_all(found, _metrics(experiment), control, others, alpha)
        course = {
            arm: over_time(compared[0], found, control, arm, alpha) for arm in others if compared and not adapts
        }  # fmt: skip
        began, ended, units, answers = found.began, found.ended, found.units, counts(found, state["arms"])
        excesses, left_out = _excesses(found, experiment), _left_out(found)
        outside = {arm: _outside(arm, excesses, state["stopped"]) for arm in others}
        if adapts:
            selection = adaptive.selection(found, experiment, epochs, unhealthy, outside)
    units_of_all = None if adapts else plan(experiment).units
    planned = {
        arm: None if units_of_all is None else math.ceil(units_of_all * (weights[control] + weights[arm]))
        for arm in others
    }
    decisions = {
        arm: _decision(experiment, arm, compared, unhealthy, outside[arm], alpha, planned[arm])
        for arm in others if not adapts
    }  # fmt: skip
    data = {
        "format": FORMAT,
        "experiment": experiment.name, "version": version, "digest": state["digest"],
        "stopped": state["stopped"], "ramping": state["ramping"], "dropped": state["dropped"],
        "began": began or None, "ended": ended or None, "unit": experiment.unit,
        "arms": [{"name": arm.name, "weight": arm.weight, "does": arm.text(), "digest": arm.digest,
                  "control": arm.plain, **answers.get(arm.name, {})}
                 for arm in experiment.arms],
        "left_out": {"units_in_two_arms": units.moved, **left_out},
        "sample_ratio": {"p": p, "threshold": THRESHOLD, "healthy": not unhealthy},
        "level": 1 - (ALPHA if adapts else alpha), "fewest": FEWEST,
        "metrics": _shown(experiment, compared, control, others),
        "guardrails": excesses,
        "allocation": selection,
        "decisions": {arm: decision._asdict() for arm, decision in decisions.items()},
        "over_time": course,
        "conversations": conversations(engine, experiment.name, version) if experiment.store_texts else [],
        "judges": state["judges"],
        "events": state["events"],
    }  # fmt: skip
    clean: dict[str, Any] = json.loads(readable_json(data))
    return {**clean, "report_digest": digest_json(clean)}


def decided(report: Mapping[str, Any]) -> bool:
    """Whether every arm has a decision: none is unhealthy, and none needs more units. With adaptive weights, whether an
    arm is selected."""
    if report["allocation"] is not None:
        return bool(report["allocation"]["state"] == "selected")
    return all(each["state"] not in ("unhealthy", "keep running") for each in report["decisions"].values())


def _metrics(experiment: Experiment) -> list[Metric]:
    """The primary metric, the secondary ones, and those of judges that the file does not name besides."""
    named = dict(experiment.metrics())
    for judge in experiment.judges:
        named.setdefault(judge.name, Metric(judge.name, "number"))
    return list(named.values())


def _decision(
    experiment: Experiment, arm: str, compared: Sequence[Comparison], unhealthy: Sequence[str],
    outside: Sequence[str], alpha: float, planned: int | None,
) -> Decision:  # fmt: skip
    found = (
        compared[0].differences[arm] if compared else Difference(math.nan, math.nan, math.nan, math.nan, 0, math.nan)
    )
    if compared and min(compared[0].estimates[name].units for name in (experiment.control.name, arm)) < FEWEST:
        found = found._replace(low=math.nan, high=math.nan, standard_error=math.nan)  # figures, and no verdict
    return decide(
        found, experiment.metric.smallest_effect or 0.0, planned=planned,
        higher_is_better=experiment.metric.better == "higher",
        unhealthy=tuple(unhealthy), breached=tuple(outside), alpha=alpha,
    )  # fmt: skip


def _outside(arm: str, excesses: Sequence[Mapping[str, Any]], stopped: str | None) -> list[str]:
    """The guardrails that an arm is surely outside of, or was when the experiment was stopped."""
    outside = [each["guardrail"] for each in excesses if each["arm"] == arm and each["state"] == "outside"]
    return [stopped] if stopped and f"arm {arm} is outside" in stopped and not outside else outside


def _shown(
    experiment: Experiment, compared: Sequence[Comparison], control: str, others: Sequence[str]
) -> list[dict[str, Any]]:
    """Every metric as JSON values. Secondary p-values are adjusted together, over metrics and arms."""
    pairs = [(each.metric.name, arm) for each in compared[1:] for arm in others]
    p_values = {(each.metric.name, arm): each.differences[arm].p for each in compared[1:] for arm in others}
    known = [pair for pair in pairs if not math.isnan(p_values[pair])]
    adjusted = dict(zip(known, benjamini_hochberg([p_values[pair] for pair in known]), strict=True))
    judges = {judge.name for judge in experiment.judges}
    shown = []
    for number, each in enumerate(compared):
        metric = each.metric
        shown.append({
            "name": metric.name, "primary": number == 0, "better": metric.better, "per": metric.per,
            "source": "judge" if metric.name in judges else metric.source, "variance_removed": each.adjusted,
            "arms": {arm: {"units": one.units, "mean": one.mean, **_of_mean(each, arm)}
                     for arm, one in each.estimates.items()},
            "differences": {
                arm: {**_of_difference(each.differences[arm]), "interval": each.intervals[arm],
                      "adjusted_p": adjusted.get((metric.name, arm)) if number else None}
                for arm in others
            },
        })  # fmt: skip
    return shown


def _of_mean(compared: Comparison, arm: str) -> dict[str, float]:
    """The interval of an arm's mean, which there is with adaptive weights."""
    return {} if compared.bounds is None else dict(zip(("low", "high"), compared.bounds[arm], strict=True))


def _of_difference(found: Difference) -> dict[str, float]:
    return {"estimate": found.estimate, "low": found.low, "high": found.high, "p": found.p}


def _excesses(found: Analysis, experiment: Experiment) -> list[dict[str, Any]]:
    """How every arm stands against every guardrail, on the answers that count."""
    arms = {arm.name: guardrails.Arm() for arm in experiment.arms}
    for tally in found.tallies:
        if tally.counted and tally.arm in arms:
            arm = arms[tally.arm]
            arm.answers += tally.answers - tally.gone - tally.refused
            arm.errors, arm.refusals = arm.errors + tally.failed, arm.refusals + tally.refusals
            arm.tokens, arm.repetition = added(arm.tokens, tally.tokens), added(arm.repetition, tally.repetition)
    for name, latencies in found.latencies(guardrails.LATENCIES).items():
        if name in arms:
            arms[name].latencies = latencies
    control, shown = arms[experiment.control.name], []
    for name in compared_arms(experiment):
        worst: dict[str, guardrails.Excess] = {}  # of a guardrail that has two sides
        for each in guardrails.excesses(control, arms[name], name, experiment.guardrails):
            other = worst.get(each.guardrail, each)
            worst[each.guardrail] = max(other, each, key=lambda excess: (excess.low > 0, excess.high))
        for each in worst.values():
            state = "outside" if each.low > 0 else "inside" if each.high < 0 else "undecided"
            shown.append({"guardrail": each.guardrail, "arm": name, "limit": experiment.guardrails[each.guardrail],
                          "compares": GUARDRAILS[each.guardrail][1], "excess": each.estimate,
                          "excess_in": guardrails.unit_of(each.guardrail), "low": each.low,
                          "high": each.high, "state": state})  # fmt: skip
    return shown


def _left_out(found: Analysis) -> dict[str, int]:
    """Answers that no comparison counts, by reason; `ramp` are those to assigned units during the ramp."""
    left: dict[str, int] = {}
    for tally in found.tallies:
        if not tally.counted:
            reason = "ramp" if tally.reason == "assigned" else tally.reason
            left[reason] = left.get(reason, 0) + tally.answers
    return dict(sorted(left.items()))
