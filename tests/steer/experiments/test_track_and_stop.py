"""Track-and-stop: shares against a search over all of them, errors of the selection, and the units that it saves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.experiments.statistics import track_and_stop
from steer.experiments.statistics.sample_ratio import mismatch_p, mismatch_p_of_epochs
from steer.experiments.statistics.simulated_selection import Arms, select


def least_ratio(weights: tuple[float, ...], means: list[float], variances: list[float], epsilon: float) -> float:
    """What the optimal weights maximise, written as the paper has it."""
    best = means.index(max(means))
    return min(
        (means[best] - means[arm] + epsilon) ** 2 / (variances[best] / weights[best] + variances[arm] / weights[arm])
        for arm in range(len(means)) if arm != best
    )  # fmt: skip


def by_search(means: list[float], variances: list[float], epsilon: float, steps: int) -> float:
    """The greatest of the least ratios over a grid of the simplex."""
    parts = itertools.product(range(1, steps), repeat=len(means) - 1)
    grid = ((*part, steps - sum(part)) for part in parts if sum(part) < steps)
    return max(least_ratio(tuple(p / steps for p in part), means, variances, epsilon) for part in grid)


@pytest.mark.parametrize(
    ("means", "variances"),
    [([0.0, 1.0], [1.0, 1.0]), ([0.0, 1.0], [4.0, 1.0]), ([0.3, 0.5, 0.45], [0.21, 0.25, 0.2]),
     ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]), ([0.1, 0.2, 0.3, 0.9], [1.0, 2.0, 1.0, 0.5])],
)  # fmt: skip
def test_shares_are_those_of_a_search_over_all_of_them(means: list[float], variances: list[float]) -> None:
    epsilon, steps = 0.1, 200 if len(means) < 4 else 40
    found = track_and_stop.optimal_weights(np.array(means), np.array(variances), epsilon)
    assert found.sum() == pytest.approx(1)
    value = least_ratio(tuple(found), means, variances, epsilon)
    searched = by_search(means, variances, epsilon, steps)
    assert searched <= value * (1 + 1e-9)
    assert searched > 0.97 * value  # the grid's optimum is near


def test_two_arms_of_one_variance_share_equally() -> None:
    found = track_and_stop.optimal_weights(np.array([[0.1, 0.9], [5.0, 4.0]]), np.ones((2, 2)), 0.05)
    np.testing.assert_allclose(found, 0.5)


def test_two_arms_share_by_their_standard_deviations() -> None:
    found = track_and_stop.optimal_weights(np.array([0.0, 1.0]), np.array([9.0, 1.0]), 0.05)
    np.testing.assert_allclose(found, [0.75, 0.25])  # Neyman's allocation


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.01, 10)), min_size=2, max_size=6), st.floats(0.01, 1))
@settings(max_examples=20, deadline=None)
def test_the_ratios_of_all_arms_are_equal_at_the_optimum(arms: list[tuple[float, float]], epsilon: float) -> None:
    means, variances = (np.array(each) for each in zip(*arms, strict=True))
    weights, best = track_and_stop.optimal_weights(means, variances, epsilon), int(means.argmax())
    others = [arm for arm in range(len(arms)) if arm != best]
    ratios = (means[best] - means[others] + epsilon) ** 2 / (
        variances[best] / weights[best] + variances[others] / weights[others]
    )
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-6)


def test_every_arm_keeps_the_smallest_share() -> None:
    shares = track_and_stop.next_shares(np.array([0.9, 0.1, 0.0]), 0.1)
    np.testing.assert_allclose(shares, [0.73, 0.17, 0.1])


def test_the_threshold_is_that_of_two_mixtures() -> None:
    """The evidence is above its threshold where the best product of two mixtures, by integration, is above its own."""
    counts, variances, prior = (300, 500), (2.0, 3.0), track_and_stop.PRIOR
    level = (2 - 1) / 0.05

    def mixture(shift: float, count: int, variance: float) -> float:
        """The likelihood ratio of a mean that is `shift` from the truth, mixed over normal alternatives."""
        spread = math.sqrt(variance / prior)
        x = np.linspace(-8 * spread, 8 * spread, 4001)
        density = scipy.stats.norm.pdf(x, scale=spread)
        return float(np.trapezoid(np.exp(count * (x * shift - x * x / 2) / variance) * density, x))

    def product(gap: float) -> float:
        """The least product over pairs of true means that are `gap` nearer."""
        split = np.linspace(0, gap, 201)
        return min(mixture(a, counts[0], variances[0]) * mixture(gap - a, counts[1], variances[1]) for a in split)

    for gap in (0.30, 0.36, 0.37, 0.38, 0.5):
        found = track_and_stop.evidence(np.array([0.0, gap - 0.1]), np.array(variances), np.array(counts), 0.1)
        assert bool(found.decided) == (product(gap) > level), gap


ALIKE, BEST = Arms((0.5,) * 4), Arms((0.5, 0.5, 0.55, 0.5))


@pytest.mark.parametrize(
    ("arms", "epsilon"), [(BEST, 0.05), (Arms((0.03, 0.02)), 0.01), (Arms((20.0, 18.0, 18.0), 10.0), 2.0)]
)
def test_the_selection_errs_in_at_most_delta_of_experiments(arms: Arms, epsilon: float) -> None:
    found = select(arms, epsilon=epsilon, units=8000, experiments=500)
    assert found.wrong <= 0.05
    assert found.decided > 0.5


def test_four_arms_need_fewer_units_than_with_equal_shares() -> None:
    adaptive = select(BEST, epsilon=0.05, units=12_000, experiments=200)
    equal = select(BEST, epsilon=0.05, units=12_000, experiments=200, smallest_share=0.25)
    assert adaptive.decided == equal.decided == 1
    assert adaptive.median_units < 0.95 * equal.median_units
    assert max(adaptive.wrong, equal.wrong) <= 0.05


def test_arms_that_are_alike_are_decided_too_and_their_shares_are_never_refused() -> None:
    found = select(ALIKE, epsilon=0.05, units=16_000, experiments=300)
    assert found.decided > 0.95
    assert found.mismatched <= 0.01


def test_the_check_of_shares_with_one_epoch_is_that_of_a_fixed_allocation() -> None:
    units, weights = {"a": 90, "b": 130, "c": 190}, {"a": 0.2, "b": 0.3, "c": 0.5}
    assert mismatch_p_of_epochs([units], [weights]) == pytest.approx(mismatch_p(units, weights))
    assert mismatch_p_of_epochs([{"a": 1}], [{"a": 1.0}]) == mismatch_p_of_epochs([], []) == 1.0


def test_the_check_of_shares_expects_units_by_the_weights_of_their_epochs() -> None:
    weights = [{"a": 0.5, "b": 0.5}, {"a": 0.1, "b": 0.9}]
    assert mismatch_p_of_epochs([{"a": 500, "b": 500}, {"a": 100, "b": 900}], weights) == pytest.approx(1)
    assert mismatch_p_of_epochs([{"a": 500, "b": 500}, {"a": 100, "b": 700}], weights) > 0.001
    assert mismatch_p_of_epochs([{"a": 500, "b": 500}, {"a": 200, "b": 800}], weights) < 0.001
    # By hand: 60 more than expected, with a variance of 1000 / 4 + 1000 * 0.09.
    z = 60 / math.sqrt(1000 / 4 + 1000 * 0.09)
    p = mismatch_p_of_epochs([{"a": 540, "b": 460}, {"a": 120, "b": 880}], weights)
    assert p == pytest.approx(2 * scipy.stats.norm.sf(z))
