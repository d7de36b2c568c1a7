"""Probes as judges: what an engine needs to read an answer, and what becomes of what it has read.

The model that is served reads an answer once more, after it was given, without any steering and without what an arm
adds to the prompt: an arm that adds the probe's direction would else be judged by what it adds. The probe scores each
token of the answer, and the mean counts, as with the scorer `probe` of `steer eval`.

An engine scores tokens for conditions. So the reading is a request under a condition on the probe that never holds: it
changes nothing, may read any layer, and its receipt says the mean over the response's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from steer.evaluation.scorers import Scored
from steer.experiments.specification import Experiment, Judge, Metric
from vectors.expression import Composition, parse
from vectors.language.terms import name_text
from vectors.probe import Probe
from vectors.steering import SteeringVector

NEVER = "1e+39"  # beyond every float32, as which scores are compared (`Condition.never`)

# Gives a judge's mean score of each answer, from its (prompt as the client sent it, text); None where it has none.
Read = Callable[[Judge, Sequence[tuple[Any, str]]], list[float | None]]


def _names(experiment: str, judge: str) -> tuple[str, str]:
    """The names, on a server, of a judge's probe and of the vector that is never added."""
    return f"judge {experiment}.{judge}", f"nothing {experiment}.{judge}"


def compositions(experiment: Experiment) -> dict[str, Composition]:
    """Everything that an experiment applies: what its arms steer by, and the readings of its judges, by what it is."""
    found = {f"arm {arm.name}": parse(arm.steer) for arm in experiment.arms if arm.steer}
    return found | {f"judge {judge}": parse(expression(experiment.name, judge)) for judge in experiment.readouts}


def expression(experiment: str, judge: str) -> str:
    """The expression under which the answers of an experiment are read for a judge."""
    probe, vector = map(name_text, _names(experiment, judge))
    return f"{vector}@while:{probe}>{NEVER}"


def sources(experiment: Experiment) -> dict[str, SteeringVector | Probe]:
    """The vectors and probes that a server loads for an experiment, by name."""
    found: dict[str, SteeringVector | Probe] = {**experiment.probes, **experiment.vectors}
    for judge, probe in experiment.readouts.items():
        named, nothing = _names(experiment.name, judge)
        vector = SteeringVector({probe.layer: torch.full((probe.hidden_size,), 1e-3)})
        found |= {named: probe, nothing: vector}
    return found


def values_of(experiment: Experiment, judge: str, scored: Sequence[Scored]) -> list[float | None]:
    """What a judge's scorer says of texts, as values of its metric; None where a score is missing."""
    probe = experiment.readouts.get(judge)
    if probe is None:
        return [each.value for each in scored]
    metric = experiment.metrics()[judge]
    return [None if each.value is None else value_of(metric, probe, each.evidence["score"]) for each in scored]


def value_of(metric: Metric, probe: Probe, score: float) -> float:
    """The value of a judge's metric for an answer with this mean score, the log-odds: itself for a number, else whether
    it lies above the probe's threshold."""
    return score if metric.kind == "number" else float(score > probe.threshold)
