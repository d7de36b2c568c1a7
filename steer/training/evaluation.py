"""How much of a behaviour a student has, and what it cost: against teacher and base, on what is held out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from probes.scores import divergence as comparing
from probes.scores.divergence import Row, Within
from steer.training.data.samples import Sample
from steer.training.data.targets import divergence


class Held(NamedTuple):
    """What nothing was trained on: the teacher's samples; neutral rows with the base's logits; rows of both classes."""

    behaviour: Sequence[Sample]
    taught: bool  # whether those are a teacher's, or texts that were given
    neutral: Sequence[Row]
    neutral_base: Mapping[int, Tensor]  # by place
    positive: Sequence[Row]
    negative: Sequence[Row]


def look(model: Any, held: Held, within: Within = comparing.plain) -> dict[str, float]:
    """The figures of one model: nats, and a perplexity.

    `kl_teacher` is KL(teacher || it) on the held-out samples, or `loss` the cross-entropy of texts that were given;
    `kl_neutral` KL(base || it) and `perplexity_neutral` on neutral rows; `margin` that of the examples of both classes,
    where there are any.
    """
    found: dict[str, float] = {}
    if held.behaviour:
        found["kl_teacher" if held.taught else "loss"] = from_teacher(model, held.behaviour, within)
    kl, scores = [], []
    for place, logits in comparing.completions(model, held.neutral, within):
        kl.append(float(comparing.divergence(held.neutral_base[place], logits).mean()))
        scores.append(_mean(comparing.scores_of(logits, held.neutral[place].said)))
    found["kl_neutral"], found["perplexity_neutral"] = _mean(kl), math.exp(-_mean(scores))
    if held.positive and held.negative:
        found["margin"] = margin(model, held.positive, held.negative, within)
    return found


def margin(model: Any, positive: Sequence[Row], negative: Sequence[Row], within: Within = comparing.plain) -> float:
    """The log-likelihood per token of the positive less that of the negative examples, in nats."""
    return likelihood(model, positive, within) - likelihood(model, negative, within)


def from_teacher(model: Any, held: Sequence[Sample], within: Within = comparing.plain) -> float:
    """The mean over samples of KL(teacher || model) on their completions, in nats per token."""
    rows = [Row(sample.ids, sample.prompt) for sample in held]
    values = []
    for place, logits in comparing.completions(model, rows, within):
        target = held[place].target
        values.append(float(divergence(logits, target.tokens, target.logs).mean()))
    return _mean(values)


def likelihood(model: Any, rows: Sequence[Row], within: Within = comparing.plain) -> float:
    """The mean over rows of the mean log-likelihood of the completion's tokens, in nats."""
    found = comparing.completions(model, rows, within)
    return _mean([_mean(comparing.scores_of(logits, rows[place].said)) for place, logits in found])


def dose(base: dict[str, float], teacher: dict[str, float], student: dict[str, float]) -> dict[str, float]:
    """How much of the teacher's behaviour the student has: 0 is the base, 1 the teacher.

    `kl` is the share of the divergence that is gone, `margin` that of the shift of the margin.
    """
    found: dict[str, float] = {}
    if base.get("kl_teacher"):
        found["kl"] = 1 - student["kl_teacher"] / base["kl_teacher"]
    if "margin" in base and teacher["margin"] != base["margin"]:
        found["margin"] = (student["margin"] - base["margin"]) / (teacher["margin"] - base["margin"])
    return found


def retention(base: dict[str, float], student: dict[str, float]) -> float:
    """Perplexity of the base over that of the student on neutral rows that the base wrote: 1 has forgotten nothing."""
    return base["perplexity_neutral"] / student["perplexity_neutral"]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
