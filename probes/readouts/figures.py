"""How well scores tell two classes apart: AUROC with its interval, calibration, and the confusion at a threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from probes.intervals import auroc, draw_resamples, supported
from probes.readouts import calibration


class Confusion(NamedTuple):
    """Counts at a threshold: positives above and not above it, negatives above and not above it."""

    true_positive: int
    false_negative: int
    false_positive: int
    true_negative: int

    def sentence(self) -> str:
        """The counts in words."""
        positives, negatives = self.true_positive + self.false_negative, self.false_positive + self.true_negative
        return (
            f"{self.true_positive} of {positives} positives above the threshold, "
            f"{self.false_positive} of {negatives} negatives"
        )


class Figures(NamedTuple):
    """Figures of log-odds scores; `auroc_low` and `auroc_high` are a 95 % bootstrap interval (`provable` widens it)."""

    auroc: float
    auroc_low: float
    auroc_high: float
    brier: float
    cross_entropy: float
    calibration_error: float
    confusion: Confusion

    def numbers(self) -> dict[str, Any]:
        """The figures as flat JSON values, rounded, since machines differ in the last bits; None for NaN."""
        flat = self._asdict() | self.confusion._asdict()
        del flat["confusion"]
        return {key: None if math.isnan(value) else round(value, 4) for key, value in flat.items()}


def figures(scores: Tensor, labels: Tensor, threshold: float, resamples: Tensor, groups: Sequence[str] = ()) -> Figures:
    """The figures of scores float64 [n] with labels bool [n], of which each class has one at least.

    `resamples` are what `probes.intervals.draw_resamples` made of the labels and these groups.
    """
    low, high = supported(scores, labels, resamples, groups)
    return Figures(
        auroc(scores[labels], scores[~labels]),
        low,
        high,
        calibration.brier(scores, labels),
        calibration.cross_entropy(scores, labels),
        calibration.calibration_error(calibration.curve(scores, labels)),
        confusion(scores, labels, threshold),
    )


def of_classes(
    positive: Tensor, negative: Tensor, threshold: float, seed: int, groups: Sequence[str] = ()
) -> tuple[Figures, Tensor, Tensor]:
    """The figures of two classes' scores, and both as scores and labels; `groups` are those of all examples."""
    import torch

    scores = torch.cat([positive, negative]).double()
    labels = torch.arange(len(scores)) < len(positive)
    return figures(scores, labels, threshold, draw_resamples(labels, seed, groups), groups), scores, labels


def confusion(scores: Tensor, labels: Tensor, threshold: float) -> Confusion:
    """The counts at a threshold; a score equal to it does not count as positive."""
    above = scores > threshold
    return Confusion(
        int((above & labels).sum()), int((~above & labels).sum()),
        int((above & ~labels).sum()), int((~above & ~labels).sum()),
    )  # fmt: skip
