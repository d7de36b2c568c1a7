"""Strengths of equal cost: for each of several arms, the greatest measured strength that stays within a KL budget.

A secant search over the logarithms of strength and divergence, where that of a small change is a parabola; all arms
take a step together, so that what they share is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

STEPS = 6
AIM = 0.92  # of the budget: what a step aims at
ENOUGH = 0.85  # of the budget: a strength that costs so much ends its search
FARTHEST = 64.0  # times the strength that a search begins with

# From strengths by arm to what each costs: the 95th percentile of the KL divergence on neutral text, in nats.
Measure = Callable[[Mapping[int, float]], Mapping[int, float]]


def strengths_within(
    budget: float, first: Sequence[float], measure: Measure, *, enough: float = ENOUGH
) -> list[tuple[float, float]]:
    """For each arm the strength and its cost; 0 and 0 for one that exceeds the budget at every strength tried.

    `first` are positive strengths to begin with; a search ends at a cost of the share `enough` of the budget. Every
    strength is rounded to three digits before it is measured, so that what is recorded is what was measured.
    """
    points: list[dict[float, float]] = [{} for _ in first]
    following = {index: rounded(strength) for index, strength in enumerate(first)}
    for _ in range(STEPS):
        if not following:
            break
        for index, cost in measure(following).items():
            points[index][following[index]] = cost
        following = {
            index: strength
            for index in following
            if (strength := _next(points[index], budget, first[index], enough)) is not None
        }
    return [max(((s, c) for s, c in each.items() if c <= budget), default=(0.0, 0.0)) for each in points]


def rounded(strength: float) -> float:
    """The strength to three digits."""
    return float(f"{strength:.3g}")


def _next(points: Mapping[float, float], budget: float, first: float, enough: float) -> float | None:
    """The strength to measure next; None when one is near enough to the budget, or nothing new is to be learned."""
    if any(enough * budget <= cost <= budget for cost in points.values()):
        return None
    below = max(((s, c) for s, c in points.items() if c <= budget), default=None)
    above = min(((s, c) for s, c in points.items() if c > budget), default=None)
    slope = 2.0  # of a parabola
    nearest = sorted((s, c) for s, c in points.items() if c > 0)
    nearest = sorted(nearest, key=lambda point: abs(math.log(point[1] / budget)))[:2]
    if len(nearest) == 2:
        (s, c), (t, d) = nearest
        slope = (math.log(c) - math.log(d)) / (math.log(s) - math.log(t))
    near = below or above
    assert near is not None
    strength, cost = near
    factor = (AIM * budget / max(cost, 1e-9)) ** (1 / min(8.0, max(0.5, slope)))
    following = strength * min(8.0, max(0.01, factor))
    if below and above:  # between the two, whatever the secant says
        following = min(max(following, 1.01 * below[0]), 0.99 * above[0])
    following = rounded(min(following, FARTHEST * first))
    return None if following in points else following
