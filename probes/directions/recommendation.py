"""Choosing where and how strongly a vector acts by default, from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from probes.directions.validation import Validation
from vectors.registry.layers import spans

DOSE = 0.4  # displacement as a share of the residual stream's mean norm; far above it, generated text degenerates
WEAKEST, STRONGEST = 0.5, 4.0


class Recommendation(NamedTuple):
    """The layers that act by default, a strength to begin with, and why."""

    layers: list[int]
    strength: float
    reason: str


def recommend(
    validated: Mapping[int, Validation], lengths: Mapping[int, float], norms: Mapping[int, float]
) -> Recommendation:
    """The middle layer of the longest run whose held-out AUROC lies within the best layer's confidence interval.

    A run, because a single early layer can separate the classes by their words alone. Its middle, because early layers
    carry the behaviour less purely, and late ones leave the model few blocks that read it. The strength moves the
    residual stream there by `DOSE` of its mean norm, rounded to halves, from `WEAKEST` to `STRONGEST`. By layer,
    `lengths` are the norms of the directions, and `norms` the mean norms of the residual stream.
    """
    if any(math.isnan(each.auroc) for each in validated.values()):
        middle = sorted(validated)[(len(validated) - 1) // 2]
        return Recommendation(
            [middle], 1.0, f"layer {middle} is the middle one; a single example of a class can't be judged"
        )
    best = max(validated, key=lambda layer: (validated[layer].auroc, validated[layer].cohens_d))
    floor = validated[best].auroc_low
    run = _longest_run([layer for layer in sorted(validated) if validated[layer].auroc >= floor], sorted(validated))
    chosen = run[(len(run) - 1) // 2]
    share = lengths[chosen] / norms[chosen] if norms[chosen] > 0 else 0.0
    unlimited = round(2 * DOSE / share) / 2 if share > 0 else 1.0
    strength = min(STRONGEST, max(WEAKEST, unlimited))
    where = (
        "the only layer"
        if len(validated) == 1
        else f"the middle of the layers ({spans(run)}) that can't be told from the best"
    )
    reason = (
        f"layer {chosen} is {where}, with held-out AUROC {validated[chosen].auroc:.3f}; "
        f"strength 1 moves the residual stream there by {share:.0%} of its norm"
    )
    if strength != unlimited:
        bound = "greatest" if unlimited > strength else "smallest"
        reason += (
            f"; {strength:g} is the {bound} strength that is recommended, and moves it by {strength * share:.0%}, "
            f"not by {DOSE:.0%}"
        )
    validation = validated[chosen]
    # A low bound alone may only mean few examples.
    if (validation.auroc_low < 0.6 and validation.auroc < 0.9) or validation.auroc < validation.auroc_shuffled + 0.1:
        reason += "; but that is hardly above shuffled labels, so do not expect it to steer"
    return Recommendation([chosen], strength, reason)


def _longest_run(layers: list[int], validated: list[int]) -> list[int]:
    """The longest run of `layers` without a gap among those validated; the first of several."""
    index_of = {layer: position for position, layer in enumerate(validated)}
    runs: list[list[int]] = []
    for layer in layers:
        if runs and index_of[layer] == index_of[runs[-1][-1]] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return max(runs, key=len)
