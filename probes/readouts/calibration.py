"""Calibration: scores as log-odds, and how far they are from it.

Both classes have the same weight in every figure, so none depends on how many examples of a class a file holds: a
readout that knows nothing has Brier score 1/4 and cross-entropy log 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probes.directions.methods.logistic import fit

LEAST_SLOPE = 1e-3  # of standardised scores, where held-out examples say that the readout has no value
BINS = 10


class Scale(NamedTuple):
    """A map from raw scores to log-odds: slope * score + offset, slope > 0."""

    slope: float
    offset: float

    def apply(self, scores: Tensor) -> Tensor:
        """The log-odds of raw scores."""
        return self.slope * scores + self.offset


def platt(scores: Tensor, labels: Tensor) -> Scale:
    """The logistic regression of the label on the score (Platt 1999), with his targets just inside 0 and 1.

    `scores` float64 [n], `labels` bool [n]. The targets keep the slope finite where the classes are separable.
    """
    deviation, mean = scores.std(), scores.mean()
    if len(scores) < 2 or not float(deviation) > 0:
        return Scale(LEAST_SLOPE, -LEAST_SLOPE * float(mean))
    positive, negative = int(labels.sum()), int((~labels).sum())
    targets = torch.where(labels, (positive + 1) / (positive + 2), 1 / (negative + 2)).double()
    coefficient, intercept = fit(((scores - mean) / deviation)[:, None], targets, balance(labels), 1e-6 * len(scores))
    if float(coefficient) < LEAST_SLOPE:
        coefficient, intercept = torch.tensor([LEAST_SLOPE]), torch.tensor(0.0)
    slope = float(coefficient) / float(deviation)
    return Scale(slope, float(intercept) - slope * float(mean))


def balance(labels: Tensor) -> Tensor:
    """The weight of each example, float64 [n], by which both classes count the same; their sum is n."""
    positive = labels.double().mean()
    return torch.where(labels, 0.5 / positive, 0.5 / (1 - positive))


def brier(scores: Tensor, labels: Tensor) -> float:
    """The mean squared error of the probability (Brier 1950); scores are log-odds."""
    return float((balance(labels) * (torch.sigmoid(scores) - labels.double()).square()).mean())


def cross_entropy(scores: Tensor, labels: Tensor) -> float:
    """The mean negative log-likelihood of the labels, in nats; scores are log-odds."""
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    return float(loss(scores.double(), labels.double(), weight=balance(labels)))


class Bin(NamedTuple):
    """One bin of a calibration curve: its examples, their mean probability, and the weighted share of positives."""

    examples: int
    probability: float
    positive: float


def curve(scores: Tensor, labels: Tensor, bins: int = BINS) -> list[Bin]:
    """The calibration curve in bins of equal width; bins without examples are left out. Scores are log-odds."""
    probability, weights = torch.sigmoid(scores.double()), balance(labels)
    index = (probability * bins).long().clamp(max=bins - 1)
    found = []
    for i in range(bins):
        inside = index == i
        if bool(inside.any()):
            total = weights[inside].sum()
            found.append(
                Bin(
                    int(inside.sum()),
                    float((weights * probability)[inside].sum() / total),
                    float(weights[inside & labels].sum() / total),
                )
            )
    return found


def calibration_error(bins: list[Bin]) -> float:
    """The expected calibration error: the mean distance of share and probability (Naeini et al. 2015)."""
    total = sum(each.examples for each in bins)
    return sum(each.examples * abs(each.probability - each.positive) for each in bins) / max(total, 1)
