"""Choosing where and how strongly a vector acts by default, from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from probes.directions.calibration import MOST_REPETITION, SLACK, Calibration
from probes.directions.validation import Validation
from vectors.registry.layers import spans

CANDIDATES = 3  # layers that are calibrated
UNPROVEN = 1.0  # the greatest strength to begin with where nothing says that the vector steers
NEARLY = 0.9  # of the best layer's separation
EARLIEST, LATEST = 0.15, 0.85  # of the depth: words are below, and above it few blocks read what was steered


class Recommendation(NamedTuple):
    """The layers that act by default, a strength to begin with, and why.

    `proven` is false where nothing that was measured says that the vector steers; then nothing is recommended, and the
    strength, at most 1, is only where to begin.
    """

    layers: list[int]
    strength: float
    reason: str
    proven: bool = True

    def value(self) -> dict[str, Any]:
        """The entry of a vector's metadata."""
        return {"layers": self.layers, "strength": self.strength, "reason": self.reason}


def candidates(validated: Mapping[int, Validation], depth: int) -> list[int]:
    """The layers to calibrate, at most `CANDIDATES`, evenly spaced, the middle one first.

    How well a layer separates the classes says little about how well it steers, so they are of all layers that separate
    them about as well as the best one: of the longest run of those whose held-out AUROC lies within the best layer's
    confidence interval, or exceeds 1/2 by at least `NEARLY` times as much. A run, because a single early layer can
    separate the classes by their words alone. Where that run has layers between `EARLIEST` and `LATEST` of the model's
    `depth` blocks, only these are taken. Without validation, the middle layer.
    """
    if any(math.isnan(each.auroc) for each in validated.values()):
        return [_middle(validated)]
    best = _best(validated)
    run = _run_above(validated, min(best.auroc_low, 0.5 + NEARLY * (best.auroc - 0.5)))
    run = [layer for layer in run if EARLIEST * depth <= layer <= LATEST * depth] or run
    count = min(CANDIDATES, len(run))
    middle = run[(len(run) - 1) // 2]
    spaced = [run[int((i + 0.5) * len(run) / count)] for i in range(count)]
    nearest = min(spaced, key=lambda layer: abs(layer - middle))
    return [middle, *(layer for layer in spaced if layer != nearest)]


def best_run(validated: Mapping[int, Validation]) -> list[int]:
    """The longest run of layers whose AUROC lies within the confidence interval of the best layer's."""
    return _run_above(validated, _best(validated).auroc_low)


def _best(validated: Mapping[int, Validation]) -> Validation:
    return max(validated.values(), key=lambda each: (each.auroc, each.cohens_d))


def _run_above(validated: Mapping[int, Validation], floor: float) -> list[int]:
    return _longest_run([layer for layer in sorted(validated) if validated[layer].auroc >= floor], sorted(validated))


def _middle(validated: Mapping[int, Validation]) -> int:
    """The middle layer of the best run, the lower one of two; without validation, of all."""
    judged = not any(math.isnan(each.auroc) for each in validated.values())
    run = best_run(validated) if judged else sorted(validated)
    return run[(len(run) - 1) // 2]


def recommend(
    validated: Mapping[int, Validation], calibration: Calibration | None = None, budget: float = 0.0
) -> Recommendation:
    """The layer and the strength that the calibration chose; without one, the middle of the best run at strength 1.

    `budget` is the calibration's, in nats.
    """
    if calibration is None:
        chosen, strength, reason = _middle(validated), 1.0, ""
        strength_reason = "strength 1 was not calibrated on generated text: try it, or run `steer sweep`"
    else:
        chosen, strength, reason = calibration.chosen.layer, calibration.chosen.strength, _by_effect(calibration)
        strength_reason = _by_cost(calibration, budget)
        if strength == 0:
            strength = 1.0  # an artifact's strength is never zero
            strength_reason = f"no strength stays within {budget:g} nats, so strength 1 is only where to begin"
    validation = validated[chosen]
    if math.isnan(validation.auroc):
        where = f"layer {chosen} is the middle one; a single example of a class can't be judged"
        return Recommendation([chosen], strength, f"{where}; {strength_reason}")
    if not reason:
        run = spans(best_run(validated))
        reason = "is the only layer" if len(validated) == 1 else f"is the middle of the best layers ({run})"
    text = f"layer {chosen} {reason}, with held-out AUROC {validation.auroc:.3f}; {strength_reason}"
    doubt = ""
    # A low bound alone may only mean few examples.
    if (validation.auroc_low < 0.6 and validation.auroc < 0.9) or validation.auroc < validation.auroc_shuffled + 0.1:
        doubt = "that is hardly above shuffled labels, so do not expect it to steer"
    elif calibration is not None and not calibration.chosen.steady:
        doubt = "the held-out margin does not follow the strength, so do not expect it to steer"
    if doubt:
        lowered = min(strength, UNPROVEN)
        text += f"; but {doubt}" + (f": strength {lowered:g} is only where to begin" if lowered < strength else "")
        strength = lowered
    return Recommendation([chosen], strength, text, not doubt)


def _by_effect(calibration: Calibration) -> str:
    points = calibration.points
    if all(point.effect == 0 for point in points):
        return "is the middle of the best layers" if len(points) > 1 else "is the only one that was calibrated"
    if len(points) == 1:
        return f"moves the held-out margin by {calibration.chosen.effect:+.2f} nats per token"
    others = spans(sorted(point.layer for point in points))
    return f"moves the held-out margin most of layers {others} ({calibration.chosen.effect:+.2f} nats per token)"


def _by_cost(calibration: Calibration, budget: float) -> str:
    """Why the strength is what it is."""
    point = next(each for each in calibration.points if each.layer == calibration.chosen.layer)
    text = (
        f"strength {point.strength:g} costs {point.p95:.2g} nats on neutral text (95th percentile of the KL divergence"
    )
    text += f", budget {budget:g})"
    if calibration.chosen.strength < point.strength:
        text += f", and was lowered to {calibration.chosen.strength:g}, since the text repeated itself"
    if calibration.repeated > MOST_REPETITION * calibration.repeated_base + SLACK:
        text += f"; {calibration.repeated:.0%} of the text's 4-grams are repeated even there"
    return text


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
