"""A quick calibration on generated text: how strongly a direction can act, and at which layer it then steers most.

At each candidate layer, the strength is the greatest one whose KL divergence from the unsteered model, on what that
model itself wrote after neutral prompts, stays within a budget (`probes.arms.neutral`). So layers are compared at equal
cost: by how far they then move the log-likelihood margin of held-out examples, steered by a direction that was made
without them. Norms and separation say neither: a direction that separates the classes perfectly may steer nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.arms import QUICK_BUDGET
from probes.arms.equal_divergence import strengths_within
from probes.arms.neutral import continuations, summary
from probes.arms.scores import Completions, TokenScores
from probes.data import prompts
from probes.generation import generate_batch
from probes.interventions import steering
from probes.models.completions import Completion
from probes.models.loading import LoadedModel
from probes.models.packed_linear import packed_linear
from probes.models.tokens import rendered
from probes.scores.repetition import repetition
from probes.statistics.strata import are_balanced, balanced
from probes.steered import Steering
from vectors.events import Event, OnEvent, ignore
from vectors.expression import Composition

PROMPTS, TOKENS = 6, 24  # of the neutral text
ENOUGH = 0.7  # of the budget: where a search may end
TEXT_TOKENS = 32  # of each text whose repetitions are counted
MOST_REPETITION = 1.5  # times the unsteered model's share of repeated 4-grams
SLACK = 0.02  # and this share besides, since a text without a repetition allows no multiple
LOWER, LOWERED = 0.7, 4  # the factor of a lower strength, and how often a strength is lowered
AT_ONCE = 3  # strengths whose texts are written together
STAGE = "calibrating on generated text"


class Point(NamedTuple):
    """One layer at its strength: `effect` is by how much it raises the held-out margin, in nats per token.

    `p95` is the 95th percentile of the KL divergence on neutral text. `steady` says whether the margin falls at minus
    the strength and rises at the strength.
    """

    layer: int
    strength: float
    effect: float
    p95: float
    steady: bool


class Calibration(NamedTuple):
    """The points of all candidate layers, the chosen one, and the shares of repeated 4-grams: unsteered and steered."""

    points: list[Point]
    chosen: Point
    repeated_base: float
    repeated: float


class Contrasted(NamedTuple):
    """Held-out completions of both classes."""

    positive: list[Completion]
    negative: list[Completion]


def calibrate(
    loaded: LoadedModel,
    directions: Mapping[int, Tensor],
    held_out: Mapping[int, Tensor],
    examples: Contrasted,
    first: Mapping[int, float],
    *,
    budget: float = QUICK_BUDGET,
    seed: int = 0,
    on_event: OnEvent = ignore,
) -> Calibration:
    """Calibrate directions [hidden] by layer, and choose a layer.

    `held_out` are the directions that were made without `examples`, which may be empty; then the first layer is
    chosen. `first` are strengths to begin with. The strength of the chosen layer is lowered until the texts that it
    writes repeat themselves hardly more than the unsteered model's.
    """
    layers = list(directions)
    with packed_linear(loaded.model):  # packed once for all four parts
        on_event(Event(STAGE, 0, 4))
        neutral = continuations(loaded, neutral_prompts(), tokens=TOKENS, seed=seed)
        on_event(Event(STAGE, 1, 4))
        at = _strengths(loaded, directions, neutral, first, budget)
        on_event(Event(STAGE, 2, 4))
        points = _effects(loaded, layers, held_out, examples, at)
        chosen = max(points, key=lambda point: (point.steady, point.effect))
        on_event(Event(STAGE, 3, 4))
        calibration = _readable(loaded, directions[chosen.layer], points, chosen)
        on_event(Event(STAGE, 4, 4))
        return calibration


def neutral_prompts(count: int = PROMPTS) -> list[str]:
    """Everyday prompts that nothing is trained on."""
    return prompts.held_out()[:count]


def _strengths(
    loaded: LoadedModel,
    directions: Mapping[int, Tensor],
    neutral: Sequence[Completion],
    first: Mapping[int, float],
    budget: float,
) -> dict[int, tuple[float, float]]:
    """The strength within the budget, and its cost, by layer."""
    layers = list(directions)
    scored = Completions(loaded.model, neutral, divergence=True)

    def costs(strengths: Mapping[int, float]) -> dict[int, float]:
        steered = [{layers[index]: strength * directions[layers[index]]} for index, strength in strengths.items()]
        measured = scored.scores(steered)
        return {
            index: summary(torch.cat(each.divergences)).p95 for index, each in zip(strengths, measured, strict=True)
        }

    if not any(each.completion_ids for each in neutral):  # a model that ends every answer at once
        return {layer: (first[layer], 0.0) for layer in layers}
    begin = [first[layer] for layer in layers]
    return dict(zip(layers, strengths_within(budget, begin, costs, enough=ENOUGH), strict=True))


def _effects(
    loaded: LoadedModel,
    layers: Sequence[int],
    held_out: Mapping[int, Tensor],
    examples: Contrasted,
    at: Mapping[int, tuple[float, float]],
) -> list[Point]:
    """The points of all layers; without held-out examples their effects are zero, and all are steady."""
    if not (examples.positive and examples.negative and held_out):
        return [Point(layer, at[layer][0], 0.0, at[layer][1], True) for layer in layers]
    scored = Completions(loaded.model, [*examples.positive, *examples.negative])
    arms: list[Any] = [None]
    for layer in layers:
        arms += [{layer: sign * at[layer][0] * held_out[layer]} for sign in (1, -1)]
    base, *margins = [margin(each, examples) for each in scored.scores(arms)]
    points = []
    for number, layer in enumerate(layers):
        plus, minus = margins[2 * number : 2 * number + 2]
        points.append(Point(layer, at[layer][0], (plus - minus) / 2, at[layer][1], minus < base < plus))
    return points


def margin(scores: TokenScores, examples: Contrasted) -> float:
    """The log-likelihood per token of the positive examples less that of the negative, in nats.

    `scores` are of the positive and then of the negative ones. Where both classes have the same few completions (yes
    and no), each counts equally, so that a preference for one of them cancels.
    """
    values = torch.stack([each.mean() for each in scores.log_likelihoods])
    strata = [[str(each.completion_ids) for each in side] for side in examples]
    closed = set(strata[0]) == set(strata[1]) and all(are_balanced(each) for each in strata)
    sides = values.split([len(side) for side in examples])
    means = [balanced(side, each if closed else None).mean() for side, each in zip(sides, strata, strict=True)]
    return float(means[0] - means[1])


def _readable(loaded: LoadedModel, direction: Tensor, points: list[Point], chosen: Point) -> Calibration:
    """The calibration, with the chosen strength lowered where the text repeats itself.

    The texts of the first few strengths are written at once, whether they are needed or not: a step of generation with
    three times the rows takes half as long again.
    """
    strengths = [chosen.strength]
    for _ in range(LOWERED if chosen.strength else 0):
        strengths.append(float(f"{LOWER * strengths[-1]:.2g}"))
    steered = [{chosen.layer: strength * direction} if strength else None for strength in strengths]
    base, *values = repetitions(loaded, [None, *steered[:AT_ONCE]])
    allowed = MOST_REPETITION * base + SLACK
    if min(values) > allowed and steered[AT_ONCE:]:
        values += repetitions(loaded, steered[AT_ONCE:])
    index = next((index for index, value in enumerate(values) if value <= allowed), len(values) - 1)
    return Calibration(points, chosen._replace(strength=strengths[index]), base, values[index])


def repetitions(loaded: LoadedModel, directions: Sequence[Mapping[int, Tensor] | None]) -> list[float]:
    """The mean share of repeated 4-grams in greedy answers to neutral prompts, under each of several directions by
    layer; None is the unsteered model. All answers are written as one batch."""
    ids = rendered(neutral_prompts(), loaded.tokenizer)
    rows: list[Steering] = [Composition(()) if each is None else each for each in directions for _ in ids]
    texts = generate_batch(
        loaded.model, loaded.tokenizer, ids * len(directions), steering(loaded.model, rows), max_tokens=TEXT_TOKENS,
        names=[str(row) for row in range(len(rows))],
    )  # fmt: skip
    shares = [repetition(each.completion_ids) for each in texts]
    return [sum(shares[i : i + len(ids)]) / len(ids) for i in range(0, len(shares), len(ids))]
