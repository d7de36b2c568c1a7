"""Validating a direction on examples that it was not made from: AUROC with its interval, Cohen's d, and both by chance.

Each fold is scored by the direction of the other folds. A score is the component along the unit direction, counted
from the middle between the two classes' means: directions of different folds differ a little, and along a large common
offset of the activations that would outweigh the difference between the classes. The figures by chance repeat
everything with labels shuffled inside each fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.controls import shuffles
from probes.directions.evidence import CHUNK, Rows, evidence_of_others, piece, pieces
from probes.directions.methods import ExtractionMethod, scaled
from probes.intervals import auroc, cohens_d, draw_resamples, supported
from vectors.errors import ExampleError

SHUFFLES = 5


class Validation(NamedTuple):
    """What was measured on held-out examples at one layer.

    `auroc_low` and `auroc_high` are a 95 % bootstrap interval, no narrower than so few examples allow (`provable`);
    `auroc_shuffled` and `cohens_d_shuffled` are means over shuffled labels: the level of chance.
    """

    auroc: float
    auroc_low: float
    auroc_high: float
    auroc_shuffled: float
    cohens_d: float
    cohens_d_shuffled: float


class Draws(NamedTuple):
    """The random draws: bootstrap counts, int16 [draws, n], labels shuffled inside each fold, bool [n] each, and the
    groups of the examples, which were drawn as a whole."""

    resamples: Tensor
    shuffled: list[Tensor]
    groups: Sequence[str]


def draw(labels: Tensor, fold: Tensor, seed: int, groups: Sequence[str] = ()) -> Draws:
    """The resamples and the shuffles. They serve every layer, so that layers are compared on the same ones."""
    return Draws(draw_resamples(labels, seed, groups), shuffles(labels, fold, seed, SHUFFLES), groups)


def validate(
    method: ExtractionMethod, rows: Rows, labels: Tensor, fold: Tensor, draws: Draws, *, paired: bool
) -> Validation:
    """Validate a method at one layer: rows [n, hidden], labels bool [n], fold int64 [n], and what `draw` made of both.

    All NaN when there is one fold only.
    """
    if int(fold.max()) == 0:
        return Validation(*[float("nan")] * 6)  # one example of a class can't be held out
    if method.NEEDS == "activations" or len(labels) * rows.shape[1] <= CHUNK:
        rows = piece(rows, 0, len(labels))  # once, for all that follows
    scores = held_out_scores(method, rows, labels, fold, paired=paired)
    low, high = supported(scores, labels, draws.resamples, draws.groups)
    shuffled_auroc, shuffled_d = [], []
    for shuffled in draws.shuffled[: 1 if method.NEEDS == "activations" else SHUFFLES]:
        # Shuffling breaks the pairs too.
        by_chance = held_out_scores(method, rows, shuffled, fold, paired=False)
        shuffled_auroc.append(auroc(by_chance[shuffled], by_chance[~shuffled]))
        shuffled_d.append(cohens_d(by_chance[shuffled], by_chance[~shuffled]))
    return Validation(
        auroc(scores[labels], scores[~labels]),
        low,
        high,
        sum(shuffled_auroc) / len(shuffled_auroc),
        cohens_d(scores[labels], scores[~labels]),
        sum(shuffled_d) / len(shuffled_d),
    )


def held_out_scores(method: ExtractionMethod, rows: Rows, labels: Tensor, fold: Tensor, *, paired: bool) -> Tensor:
    """The score of every row, float64 [n], along the direction of the folds that it is not in."""
    others = evidence_of_others(method.NEEDS, rows, labels, fold, paired)
    units = torch.empty(len(others), rows.shape[1], dtype=torch.float64)
    middles = torch.empty(len(others), dtype=torch.float64)
    for held_out, evidence in enumerate(others):
        middle = (evidence.positive.mean + evidence.negative.mean) / 2
        try:
            direction = scaled(method.direction(evidence), evidence)
        except ExampleError:
            direction = torch.zeros_like(middle)  # nothing tells the classes apart: every score is the same
        units[held_out] = direction / direction.norm().clamp_min(torch.finfo(torch.float64).tiny)
        middles[held_out] = middle @ units[held_out]
    scores = torch.empty(len(labels), dtype=torch.float64)
    for start, stop in pieces(len(labels), rows.shape[1]):
        folds = fold[start:stop]
        scores[start:stop] = (piece(rows, start, stop) @ units.T).gather(1, folds[:, None])[:, 0] - middles[folds]
    return scores
