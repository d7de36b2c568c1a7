"""Arms at equal cost: scaled so that the 95th percentile of their KL on neutral text is a given one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from steer.evaluation.arms.arm import Arm
from steer.evaluation.measuring.divergences import summary

TOLERANCE = 0.1  # of the logarithm of the KL
STEPS = 6
STRONGEST = 30.0  # times the strength that the search begins with

# From arms to KL(base || arm) of every token on neutral text, as `measure_divergences` gives it.
Measure = Callable[[Sequence[Arm]], Sequence[Tensor]]


def at_divergence(
    arms: Sequence[Arm], target: float, measure: Measure, *, tolerance: float = TOLERANCE
) -> list[tuple[Arm, float]]:
    """Each arm scaled to a 95th percentile of the KL of `target` nats, and the factor that did it.

    A secant search over the logarithms of factor and KL, where the KL of a small change is a parabola. All arms of a
    step are measured together. An arm that does not reach the target within `STRONGEST` is returned as near as it came.
    Raises ExpressionError for an arm that can't be scaled.
    """
    if target <= 0:
        return [(arm.scaled(0.0), 0.0) for arm in arms]
    searches = [_Search(target) for _ in arms]
    for _ in range(STEPS):
        running = [index for index, search in enumerate(searches) if not search.ended(tolerance)]
        if not running:
            break
        scaled = [arms[index].scaled(searches[index].next) for index in running]
        for index, values in zip(running, measure(scaled), strict=True):
            searches[index].add(summary(values).p95)
    return [(arm.scaled(search.best), search.best) for arm, search in zip(arms, searches, strict=True)]


class _Search:
    """The points of one arm's search: logarithms of factors and of the KL that they gave, relative to the target."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.points: list[tuple[float, float]] = []
        self.position = 0.0

    @property
    def next(self) -> float:
        """The factor to measure next."""
        return math.exp(self.position)

    @property
    def best(self) -> float:
        """The factor that came nearest to the target."""
        return math.exp(min(self.points, key=lambda point: abs(point[1]))[0]) if self.points else 1.0

    def ended(self, tolerance: float) -> bool:
        """Whether the target is reached, or the last step changed nothing."""
        reached = any(abs(value) <= tolerance for _, value in self.points)
        return reached or (len(self.points) > 1 and self.points[-1][0] == self.points[-2][0])

    def add(self, divergence: float) -> None:
        """Add the KL at the position, and move on."""
        self.points.append((self.position, math.log(max(divergence, 1e-12) / self.target)))
        here, value = self.points[-1]
        slope = 2.0  # a parabola
        if len(self.points) > 1:
            (before, other) = self.points[-2]
            if here != before:
                slope = min(6.0, max(0.5, (value - other) / (here - before)))
        limit = math.log(STRONGEST)
        self.position = min(limit, max(-limit, here - value / slope))
