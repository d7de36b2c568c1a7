"""What the figures say: for each subject and metric the verdict, the slopes, and the curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.statistics.paired import Difference, difference
from probes.statistics.slopes import Slopes, distribution, slopes, spearman
from probes.statistics.strata import are_balanced, balanced, by_stratum
from probes.statistics.verdict import Outcome, Verdict, verdict
from steer.evaluation.measuring.divergences import Divergence
from steer.evaluation.planning import Plan
from steer.evaluation.suites.items import UNITS, Item, groups_of, is_grouped, metric_of, strata_of


class Metric(NamedTuple):
    """One kind of figure: its name and unit, the columns of the items that have it, their groups and their strata.

    `groups` is None where items are not grouped, `strata` where no answers need to be balanced.
    """

    name: str
    unit: str
    columns: list[int]
    groups: list[str] | None
    strata: list[str] | None

    def of(self, figures: Tensor) -> Tensor:
        """These items' columns of figures [..., items], each answer counted equally."""
        return balanced(figures[..., self.columns], self.strata)


class Point(NamedTuple):
    """A point of the curve on development items: the factor, the dose, the change of the figure, the KL."""

    factor: float
    dose: float
    change: Difference
    divergence: Divergence


class Judged(NamedTuple):
    """A subject under one metric: its effect on test items, its verdict, and how single items answer to strength.

    `slopes` are over the test items at -1, 0 and 1 times the strength, None of what has no opposite sign
    or changes nothing. `by_answer`
    is the effect on the items of each answer, None where answers are not balanced. `in_template` is the effect on test
    items whose group development items share, `out_of_template` on those of other groups. `beyond_prompt` is the
    figure of the subject less that of the prompt baseline, `added_to_prompt` that of both together less the prompt's.
    """

    metric: Metric
    effect: Difference
    verdict: Verdict
    slopes: Slopes | None
    curve: list[Point]
    monotonicity: float | None  # Spearman's correlation of the curve's mean with strength
    item_monotonicity: float | None  # the median over development items of the same
    in_template: Difference | None
    out_of_template: Difference | None
    by_answer: dict[str, float] | None
    beyond_prompt: Difference | None = None
    added_to_prompt: Difference | None = None


def metrics_of(items: Sequence[Item]) -> list[Metric]:
    """The metrics that these items have: `margin` of pairs, `log-odds` of choices."""
    grouped, groups = is_grouped(items), groups_of(items)
    metrics = []
    for name, unit in UNITS.items():
        columns = [index for index, item in enumerate(items) if metric_of(item) == name]
        if columns:
            strata = strata_of([items[c] for c in columns])
            metrics.append(Metric(name, unit, columns, [groups[c] for c in columns] if grouped else None, strata))
    return metrics


def judged(
    plan: Plan,
    metric: Metric,
    figures: Mapping[str, Tensor],
    dev_metric: Metric | None,
    curve: Mapping[float, Tensor],
    divergences: Mapping[float, Divergence],
    dose: float,
    seen_groups: frozenset[str],
    seed: int,
) -> Judged:
    """Judge one subject under one metric.

    `figures` are those of the test items [items] by arm's name, `curve` those of the development items by factor;
    `seen_groups` are the groups of development items.
    """

    def of(name: str) -> Tensor:
        return figures[name][metric.columns]

    def balanced_of(name: str) -> Tensor:
        return metric.of(figures[name])

    base, subject = of("base"), of(plan.subject.arm.name)
    families = {name: torch.stack([balanced_of(arm.name) for arm in arms]) for name, arms in plan.controls.items()}
    change, balanced_subject = subject - base, balanced_of(plan.subject.arm.name)
    of_items = None
    if plan.negation is not None:
        points_of_items = torch.stack([of(plan.negation.name), base, subject])
        of_each_item = slopes([-1.0, 0.0, 1.0], points_of_items)
        if bool(of_each_item.any()):  # of what changes nothing, no item goes a way
            of_items = distribution(of_each_item, metric.groups)
    points, monotonicity, of_each = [], None, None
    if curve and dev_metric is not None and len(dev_metric.columns) > 1:
        measured = {factor: dev_metric.of(values) for factor, values in curve.items()}
        points = [
            Point(f, abs(f) * dose, difference(v - measured[0.0], dev_metric.groups, seed=seed), divergences[f])
            for f, v in measured.items()
        ]
        monotonicity = spearman(list(measured), torch.stack(list(measured.values())).mean(1))
        columns = torch.stack([values[dev_metric.columns] for values in curve.values()]).T
        of_each = float(torch.tensor([spearman(list(measured), column) for column in columns]).median())
    templates: list[Difference | None] = [None, None]
    if metric.groups is not None:
        for position, inside in enumerate((True, False)):
            rows = [i for i, group in enumerate(metric.groups) if (group in seen_groups) == inside]
            if rows:
                part, groups = _part(metric, change, rows), [metric.groups[i] for i in rows]
                templates[position] = difference(part, groups, seed=seed)

    def less_prompt(values: Tensor) -> Difference:
        return difference(values - balanced_of(plan.others["prompt"].name), metric.groups, seed=seed)

    both = plan.others.get("prompt + subject")
    return Judged(
        metric, difference(balanced_subject - balanced_of("base"), metric.groups, seed=seed),
        verdict(balanced_subject, families, metric.groups, seed=seed), of_items, points, monotonicity, of_each,
        templates[0], templates[1], None if metric.strata is None else by_stratum(change, metric.strata),
        less_prompt(balanced_subject) if "prompt" in plan.others else None,
        None if both is None else less_prompt(balanced_of(both.name)),
    )  # fmt: skip


def _part(metric: Metric, change: Tensor, rows: Sequence[int]) -> Tensor:
    """The change on some of a metric's items; answers count equally where each is that of several of them."""
    strata = None if metric.strata is None else [metric.strata[i] for i in rows]
    return balanced(change[rows], strata if strata and are_balanced(strata) else None)


def outcome_of(judgements: Sequence[Judged]) -> Outcome:
    """The outcome over all metrics: it works if it works under each that has enough items, and one has."""
    outcomes = {each.verdict.outcome for each in judgements} - {"too few items"}
    if not outcomes:
        return "too few items"
    return "works" if outcomes == {"works"} else "does not work"


def sentence(name: str, judgements: Sequence[Judged], divergence: Divergence) -> str:
    """The verdict as one sentence with its figures."""
    outcome = outcome_of(judgements)
    head = {"works": "works", "does not work": "does not work", "too few items": "can't be judged"}[outcome]
    parts = []
    for each in judgements:
        effect = each.effect
        reason = each.verdict.reason.removeprefix("it ") + _detectable(each.verdict)
        parts.append(
            f"it moves the {each.metric.name} by {effect.mean:+.3f} {each.metric.unit} "
            f"({effect.low:+.3f} to {effect.high:+.3f}) on {effect.items} test items, and {reason}"
        )
    return f"{name} {head}: {'; '.join(parts)}. 95th percentile of the KL on neutral text: {divergence.p95:.3f} nats."


def _detectable(found: Verdict) -> str:
    """The smallest difference that would be found from the control of which that is the largest; "" of none."""
    known = [each for each in found.against if math.isfinite(each.detectable)]
    if not known:
        return ""
    # The negation lies as far beyond the base as the subject before it: a difference from it is two effects.
    hardest = max(known, key=lambda c: c.detectable / (2 if c.control == "negation" else 1))
    return f"; a difference of {hardest.detectable:.3f} from {hardest.control} would be detected"


def value_of(each: Judged) -> dict[str, Any]:
    """A judgement as JSON values."""
    return {
        "metric": each.metric.name,
        "unit": each.metric.unit,
        "items": each.effect.items,
        "groups": None if each.metric.groups is None else len(set(each.metric.groups)),
        "effect": each.effect._asdict(),
        "outcome": each.verdict.outcome,
        "reason": each.verdict.reason,
        "against": [
            {
                "control": c.control, "draws": c.draws, "beaten": c.beaten, "p_holm": c.p_adjusted,
                **c.difference._asdict(), "detectable": c.detectable,
            }
            for c in each.verdict.against
        ],
        "slopes": each.slopes and each.slopes._asdict(),
        "curve": [
            {
                "factor": p.factor, "dose": p.dose, "kl": p.divergence._asdict(), **p.change._asdict(),
            }
            for p in each.curve
        ],
        "curve_items": "development items: they choose nothing here, and are not those of the verdict",
        "monotonicity": each.monotonicity,
        "item_monotonicity": each.item_monotonicity,
        "in_template": each.in_template and each.in_template._asdict(),
        "out_of_template": each.out_of_template and each.out_of_template._asdict(),
        "by_answer": each.by_answer,
        "beyond_prompt": each.beyond_prompt and each.beyond_prompt._asdict(),
        "added_to_prompt": each.added_to_prompt and each.added_to_prompt._asdict(),
    }  # fmt: skip
