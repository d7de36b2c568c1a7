"""What scorers say of the texts of every arm: rates with intervals, differences in pairs, and how far to trust them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from probes.statistics import paired
from steer.evaluation.judging.agreement import Agreement, Labels, agreement
from steer.evaluation.judging.pairs import Preference
from steer.evaluation.scorers import ConfiguredScorer, GeneratedText, Rate, Resources, Scored, rate, scorer
from steer.evaluation.scorers import judge as judge_scorer


class Preferred(NamedTuple):
    """How often a judge preferred an arm's response to the base's; ties count half.

    `abstained` counts the pairs in which the decision changed with the order of the two texts; `missing` those without
    a decision, by reason.
    """

    rate: float | None
    interval: tuple[float, float] | None
    wins: int
    losses: int
    ties: int
    abstained: int
    missing: dict[str, int]


class ScoredArm(NamedTuple):
    """One arm under one scorer; `difference` and `preferred` are None for the base itself."""

    scored: list[Scored]
    rate: Rate
    difference: paired.Difference | None
    preferred: Preferred | None

    def value(self) -> dict[str, Any]:
        """As JSON values, with the score of every text."""
        return {
            "rate": self.rate._asdict(),
            "difference": self.difference and self.difference._asdict(),
            "preferred": self.preferred and self.preferred._asdict(),
            "scores": [each._asdict() for each in self.scored],
        }


class ScorerReport(NamedTuple):
    """One scorer on all arms, and its agreement with hand labels; None where there are none."""

    scorer: ConfiguredScorer
    unit: str
    arms: dict[str, ScoredArm]
    agreement: Agreement | None

    @property
    def validity(self) -> str:
        """A sentence: how far the scorer agrees with people, or that it is not known."""
        name = self.scorer.name
        if self.agreement is None:
            return f"{name} not validated: no hand labels (--labels FILE)"
        compared = self.agreement.labels - self.agreement.missing
        if not compared:
            return f"{name} not validated: none of the {self.agreement.labels} labelled texts has a score"
        if self.agreement.kappa is None:
            return f"{name}: kappa is not defined on {compared} labels, since all are of one category"
        kappa, interval = self.agreement.kappa, self.agreement.interval
        span = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
        few = ", too few to rely on" if self.agreement.few else ""
        return f"{name}: Cohen's kappa {kappa:.2f}{span} on {compared} hand labels{few}"

    def value(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **self.scorer.value(),
            "unit": self.unit,
            "arms": {name: arm.value() for name, arm in self.arms.items()},
            "agreement": self.agreement and self.agreement.value(),
            "validity": self.validity,
        }


def score_arms(
    texts: Mapping[str, Sequence[GeneratedText]],
    scorers: Sequence[ConfiguredScorer],
    resources: Resources,
    *,
    base: str = "base",
    groups: Sequence[str] = (),
    labels: Labels | None = None,
) -> list[ScorerReport]:
    """What each scorer says of the texts of each arm, which answer the same prompts in the same order.

    `base` is the arm that the others are compared with, `groups` has an entry for each prompt. The scorers see the
    texts of all arms at once, and do not learn which arm wrote which. Nothing is raised for a judge that is down or
    answers nonsense: its scores are missing, and counted.
    """
    reports = []
    for each in scorers:
        module = scorer(each.kind)
        scored = iter(each.score([text for arm in texts.values() for text in arm], resources))
        by_arm = {name: [next(scored) for _ in arm] for name, arm in texts.items()}
        arms = {}
        for name, of_arm in by_arm.items():
            compared = name != base and base in by_arm
            arms[name] = ScoredArm(
                of_arm,
                rate(of_arm, groups, resources.seed),
                difference(of_arm, by_arm[base], groups, resources.seed) if compared else None,
                _preferred(each, texts[name], texts[base], groups, resources) if compared else None,
            )
        reports.append(ScorerReport(each, module.UNIT, arms, _agreement(each, module.GRADED, labels, resources)))
    return reports


def difference(
    scored: Sequence[Scored], base: Sequence[Scored], groups: Sequence[str] = (), seed: int = 0
) -> paired.Difference | None:
    """The paired difference of two arms' scores; None where no prompt has a score in both."""
    pairs = [
        (index, one.value - other.value)
        for index, (one, other) in enumerate(zip(scored, base, strict=True))
        if one.value is not None and other.value is not None
    ]
    if not pairs:
        return None
    chosen = [groups[index] for index, _ in pairs] if groups else None
    return paired.difference(torch.tensor([value for _, value in pairs]), chosen, seed=seed)


def preferred(preferences: Sequence[Preference], groups: Sequence[str] = (), seed: int = 0) -> Preferred:
    """The share of pairs that were won, of those with a decision."""
    values = [None if each.value is None else (each.value + 1) / 2 for each in preferences]
    summary = rate(
        [Scored(value, reason=each.reason) for value, each in zip(values, preferences, strict=True)], groups, seed
    )
    counts = Counter(each.value for each in preferences)
    missing = dict(summary.missing)
    abstained = missing.pop("order", 0)
    return Preferred(summary.mean, summary.interval, counts[1], counts[-1], counts[0], abstained, missing)


def _preferred(
    each: ConfiguredScorer, texts: Sequence[GeneratedText], base: Sequence[GeneratedText], groups: Sequence[str],
    resources: Resources,
) -> Preferred | None:  # fmt: skip
    """A judge's preferences between an arm and the base; None for scorers that compare nothing."""
    if not isinstance(each.settings, judge_scorer.Settings) or not each.settings.pairwise:
        return None
    return preferred(judge_scorer.preferences(each.settings, texts, base, resources), groups, resources.seed)


def _agreement(each: ConfiguredScorer, graded: bool, labels: Labels | None, resources: Resources) -> Agreement | None:
    if labels is None:
        return None
    scored = each.score([GeneratedText(text.prompt, text.response) for text in labels.texts], resources)
    return agreement(labels, [one.decision for one in scored], graded=graded, seed=resources.seed)
