"""Strengths of equal cost, on functions whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from probes.arms.equal_divergence import ENOUGH, STEPS, strengths_within

COSTS: list[Callable[[float], float]] = [
    lambda s: 0.3 * s**2,
    lambda s: 5 * s**2,
    lambda s: 0.001 * s**4,
    lambda s: 2 * s / (1 + s),
    lambda s: 0.02 * s**2 + 0.4 * s,
]


@pytest.mark.parametrize("first", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("cost", COSTS)
def test_the_strength_is_within_the_budget_and_near_it(cost: Callable[[float], float], first: float) -> None:
    ((strength, reached),) = strengths_within(0.1, [first], lambda arms: {i: cost(s) for i, s in arms.items()})
    assert reached == cost(strength)
    assert ENOUGH * 0.1 <= reached <= 0.1


def test_all_arms_take_a_step_together_and_none_more_than_allowed() -> None:
    steps: list[dict[int, float]] = []

    def measure(arms: Mapping[int, float]) -> dict[int, float]:
        steps.append(dict(arms))
        return {i: COSTS[i](s) for i, s in arms.items()}

    strengths_within(0.1, [1.0] * len(COSTS), measure)
    assert [*steps[0]] == list(range(len(COSTS)))
    assert len(steps) <= STEPS


def test_what_costs_too_much_at_every_strength_has_none() -> None:
    assert strengths_within(0.1, [1.0], lambda arms: dict.fromkeys(arms, 3.0)) == [(0.0, 0.0)]


def test_what_costs_nothing_ends_at_the_farthest_strength() -> None:
    ((strength, cost),) = strengths_within(0.1, [0.5], lambda arms: dict.fromkeys(arms, 0.0))
    assert (strength, cost) == (32.0, 0.0)
