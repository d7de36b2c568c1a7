"""Measures of answers, their differences from the control prompt by prompt, and what follows for the main metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch

from probes.models.loading import load
from probes.scores.repetition import repetition
from probes.statistics.paired import Difference, difference
from probes.statistics.verdict import FEWEST
from steer.evaluation.scorers import GeneratedText, Resources
from steer.experiments.paired.answers import Answer, Row
from steer.experiments.paired.inputs import Inputs
from steer.experiments.running.measures import refuses
from steer.experiments.running.questions import scores_by
from steer.experiments.running.readouts import values_of
from steer.experiments.specification import Metric
from vectors.events import OnEvent

# What is computed of every answer: its unit.
MEASURES: Mapping[str, str] = {
    "response_tokens": "tokens",
    "characters": "characters",
    "repetition": "share of repeated 4-grams of tokens",
    "refusal": "share of answers that refuse",
    "likelihood": "nats per token under the unsteered model",
}
LENGTHS = ("response_tokens", "characters")  # measures that --max-tokens limits
MOST_CUT = 0.1  # share of an arm's answers that may be cut before lengths give no verdict
Verdict = Literal["better", "worse", "no difference", "undecided", "too few prompts", "cut off"]
Scores = dict[str, list[float | None]]  # by arm, in the order of the rows


class Compared(NamedTuple):
    """An arm under one measure: its mean, and the difference from the control; None for the control itself.

    `missing` counts answers without a score.
    """

    mean: float | None
    difference: Difference | None
    missing: int


class Cut(NamedTuple):
    """The shares of the answers of an arm and of the control that are as long as --max-tokens, the limit, allows."""

    arm: float
    control: float
    limit: int

    def hides(self, gain: Difference) -> bool:
        """Whether a difference in lengths may be another one than that of whole answers.

        If only the control's answers are cut, an arm that is shorter is shorter by even more, and the other way round.
        """
        shorter, longer = gain.high < 0, gain.low > 0
        return (self.arm > MOST_CUT and not longer) or (self.control > MOST_CUT and not shorter)


class Judged(NamedTuple):
    """What the main metric says of an arm, and a sentence about it."""

    arm: str
    metric: str
    verdict: Verdict
    reason: str


def measured(answer: Answer) -> dict[str, float | None]:
    """The measures of an answer."""
    return {
        "response_tokens": float(len(answer.ids)),
        "characters": float(len(answer.text)),
        "repetition": repetition(answer.ids),
        "refusal": float(refuses(answer.text)),
        "likelihood": answer.likelihood,
    }


def scores_of(
    inputs: Inputs, rows: Sequence[Row], answers: Mapping[str, Sequence[Answer]], seed: int, device: str, dtype: str,
    on_event: OnEvent,
) -> dict[str, tuple[str, Scores]]:  # fmt: skip
    """(unit, scores by arm) of every measure, of the scorers, and of the experiment's judges, by name.

    Scorers and judges see the texts of all arms at once, and do not learn which arm wrote which.
    """
    table = {name: [measured(each) for each in listed] for name, listed in answers.items()}
    found: dict[str, tuple[str, Scores]] = {
        measure: (unit, {arm: [each[measure] for each in listed] for arm, listed in table.items()})
        for measure, unit in MEASURES.items()
    }
    if all(value is None for listed in found["likelihood"][1].values() for value in listed):
        del found["likelihood"]  # it was not asked for
    texts = [
        GeneratedText(inputs.prompts[row.prompt], each.text)
        for listed in answers.values()
        for row, each in zip(rows, listed, strict=True)
    ]

    def by_arm(values: Sequence[float | None]) -> Scores:
        return {arm: list(values[i * len(rows) : (i + 1) * len(rows)]) for i, arm in enumerate(answers)}

    loaded = load(inputs.opened, device, dtype) if any(each.kind == "probe" for each in inputs.scorers) else None
    resources = Resources(loaded=loaded, device=device, seed=seed, on_event=on_event)
    for each in inputs.scorers:
        found[each.name] = ("score", by_arm(values_of(inputs.experiment, each.name, each.score(texts, resources))))
    for judge in inputs.experiment.judges:
        if not judge.scorer:
            metric = inputs.experiment.metrics()[judge.name]
            found[judge.name] = ("score", by_arm(scores_by(judge, metric, texts, on_event)))
    return found


def compared(scores: Scores, rows: Sequence[Row], control: str, seed: int, confidence: float) -> dict[str, Compared]:
    """Every arm against the control, by the paired difference over prompts; samples of a prompt are one cluster."""
    result = {}
    for arm, values in scores.items():
        pairs = [
            (row.prompt, value - other)
            for row, value, other in zip(rows, values, scores[control], strict=True)
            if value is not None and other is not None
        ]
        gain = None
        if arm != control and pairs:
            differences = torch.tensor([gap for _, gap in pairs], dtype=torch.float64)
            gain = difference(differences, [str(prompt) for prompt, _ in pairs], seed=seed, confidence=confidence)
        present = [value for value in values if value is not None]
        mean = sum(present) / len(present) if present else None
        result[arm] = Compared(mean, gain, len(values) - len(present))
    return result


def verdict_of(arm: str, metric: Metric, gain: Difference | None, cut: Cut) -> Judged:
    """What the difference in the main metric says of an arm, by its direction and the smallest effect that matters.

    Lengths of answers that are cut off say nothing, unless that can only have made the difference smaller.
    """
    if gain is None or gain.clusters < FEWEST:
        count = 0 if gain is None else gain.clusters
        return Judged(arm, metric.name, "too few prompts", f"{count} prompts; a verdict needs {FEWEST}")
    if metric.name in LENGTHS and cut.hides(gain):
        return Judged(
            arm, metric.name, "cut off",
            f"{cut.arm:.0%} of its answers and {cut.control:.0%} of the control's are cut at {cut.limit} tokens, so "
            f"their lengths are not known: raise --max-tokens above {cut.limit}",
        )  # fmt: skip
    low, high = (gain.low, gain.high) if metric.better == "higher" else (-gain.high, -gain.low)
    if low > 0:
        return Judged(arm, metric.name, "better", "the interval of the difference lies on the better side")
    if high < 0:
        return Judged(arm, metric.name, "worse", "the interval of the difference lies on the worse side")
    effect = metric.smallest_effect
    if effect is not None and -effect < low and high < effect:
        return Judged(
            arm, metric.name, "no difference", f"no difference larger than the smallest effect of interest, {effect:g}"
        )
    return Judged(arm, metric.name, "undecided", "the interval of the difference holds zero")
