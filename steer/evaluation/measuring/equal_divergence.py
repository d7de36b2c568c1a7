"""Arms at equal cost: scaled so that the 95th percentile of their KL on neutral text is a given one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from probes.arms.equal_divergence import strengths_within
from steer.evaluation.arms.arm import Arm
from steer.evaluation.measuring.divergences import summary

TOLERANCE = 0.1  # of the logarithm of the KL

# From arms to KL(base || arm) of every token on neutral text, as `measure_divergences` gives it.
Measure = Callable[[Sequence[Arm]], Sequence[Tensor]]


def at_divergence(
    arms: Sequence[Arm], target: float, measure: Measure, *, tolerance: float = TOLERANCE
) -> list[tuple[Arm, float]]:
    """Each arm scaled to a 95th percentile of the KL of `target` nats, and the factor that did it.

    All arms of a step are measured together. An arm that does not reach the target is returned as near below it as it
    came (`probes.arms.equal_divergence`). Raises ExpressionError for an arm that can't be scaled.
    """
    if target <= 0:
        return [(arm.scaled(0.0), 0.0) for arm in arms]

    def costs(factors: Mapping[int, float]) -> dict[int, float]:
        values = measure([arms[index].scaled(factor) for index, factor in factors.items()])
        return {index: summary(each).p95 for index, each in zip(factors, values, strict=True)}

    highest = target * math.exp(tolerance)
    found = strengths_within(highest, [1.0] * len(arms), costs, enough=math.exp(-2 * tolerance))
    return [(arm.scaled(factor), factor) for arm, (factor, _) in zip(arms, found, strict=True)]
