"""The statistics of experiments, against gbstats 0.8.0 (recorded), scipy, and simulations of what they promise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from steer.experiments.statistics import bounded, bounds, moments, sequences, simulation
from steer.experiments.statistics.decision import decide, more_units
from steer.experiments.statistics.moments import Estimate, Sums
from steer.experiments.statistics.sample_ratio import chi_square_tail, mismatch_p
from steer.experiments.statistics.sequences import Difference, difference, half_width, p_value, units_until
from steer.experiments.statistics.simulation import simulate

RECORDED = json.loads((Path(__file__).parent / "gbstats.json").read_text())  # gbstats 0.8.0, on sums drawn at random


def _agrees(case: dict, control: Estimate, other: Estimate) -> None:
    result = difference(control, other, alpha=case["alpha"], tuned_at=case["tuned_at"])
    np.testing.assert_allclose([result.estimate, result.low, result.high, result.p], case["gives"], rtol=1e-8)


@pytest.mark.parametrize("case", RECORDED["mean"])
def test_a_difference_of_means_is_that_of_gbstats(case):
    _agrees(case, *(moments.mean(Sums(*arm)) for arm in case["arms"]))


@pytest.mark.parametrize("case", RECORDED["ratio"])
def test_a_difference_of_ratios_is_that_of_gbstats(case):
    _agrees(case, *(moments.ratio(Sums(*arm)) for arm in case["arms"]))


@pytest.mark.parametrize("case", RECORDED["covariate"])
def test_an_adjusted_difference_is_that_of_gbstats(case):
    _agrees(case, *(moments.adjusted(Sums(*arm), case["slope"], 0.0) for arm in case["arms"]))


@pytest.mark.parametrize("case", RECORDED["sample_ratio"])
def test_the_sample_ratio_check_is_that_of_gbstats(case):
    arms = [str(i) for i in range(len(case["units"]))]
    p = mismatch_p(dict(zip(arms, case["units"], strict=True)), dict(zip(arms, case["weights"], strict=True)))
    assert p == pytest.approx(case["gives"], rel=1e-9)


@pytest.mark.parametrize("degrees", range(1, 12))
def test_the_tail_of_chi_square_is_that_of_scipy(degrees):
    for x in (0.0, 0.3, 1.0, 5.0, 12.0, 40.0):
        assert chi_square_tail(x, degrees) == pytest.approx(scipy.stats.chi2.sf(x, degrees), rel=1e-10, abs=1e-300)


@given(
    z=st.floats(-12, 12), units=st.integers(4, 10**7), alpha=st.sampled_from([0.01, 0.05, 0.1]),
    tuned_at=st.sampled_from([100, 5_000, 10**6]),
)  # fmt: skip
def test_the_p_value_is_at_most_alpha_exactly_when_the_interval_excludes_zero(z, units, alpha, tuned_at):
    width = half_width(1.0, units, alpha, tuned_at)
    if abs(abs(z) - width) > 1e-9 * width:
        assert (p_value(z, units, alpha, tuned_at) <= alpha) == (abs(z) > width)


def test_the_covariate_removes_the_variance_that_it_explains_and_moves_no_mean():
    generator = np.random.default_rng(1)
    x = generator.normal(size=4000)
    y = 3 * x + generator.normal(size=4000)
    arms = [
        moments.sums_of(y[:2000].tolist(), x[:2000].tolist()),
        moments.sums_of(y[2000:].tolist(), x[2000:].tolist()),
    ]
    slope = moments.covariate_slope(arms)
    assert slope == pytest.approx(3, abs=0.1)
    after = [moments.adjusted(arm, slope, float(x.mean())) for arm in arms]
    assert after[0].variance == pytest.approx(1, abs=0.1)
    plain = moments.added(*arms)
    assert np.mean([each.mean for each in after]) == pytest.approx(plain.y / plain.units)
    # The slope that scipy's regression finds within one arm alone is that of the formula with one arm.
    assert moments.covariate_slope(arms[:1]) == pytest.approx(scipy.stats.linregress(x[:2000], y[:2000]).slope)


def test_a_constant_covariate_adjusts_nothing():
    arm = moments.sums_of([1.0, 2.0, 4.0], [5.0, 5.0, 5.0])
    assert moments.covariate_slope([arm]) == 0
    assert moments.adjusted(arm, 0.0, 5.0) == pytest.approx(moments.mean(arm))


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (480, 1000)])
def test_wilsons_interval_is_that_of_scipy(successes, trials):
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert bounds.wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_benjamini_hochberg_is_that_of_scipy(p_values):
    expected = scipy.stats.false_discovery_control(p_values)
    assert bounds.benjamini_hochberg(p_values) == pytest.approx(expected, abs=1e-12)


def test_a_one_sided_bound_is_that_of_a_z_test():
    control, other = Estimate(400, 1.0, 4.0), Estimate(900, 1.3, 9.0)
    error = math.sqrt(4 / 400 + 9 / 900)
    low, high = bounds.one_sided(control, other)
    assert (low, high) == pytest.approx(scipy.stats.norm.interval(0.9, 0.3, error))


# ---- what is promised at every look


def test_without_a_difference_at_most_five_percent_of_experiments_are_ever_significant():
    """2,000 experiments of 40 looks; a z-test that is looked at as often errs in about 31 % of them."""
    for arguments in ({"spread": 1.0}, {"spread": 0.0, "rate": 0.3}):
        rates = simulate({"a": 1, "b": 1}, effect=0.0, units=8_000, looks=40, experiments=2_000, seed=3, **arguments)
        assert rates.low <= 0.05, rates
        assert rates.significant <= 0.05, rates
        assert rates.covered >= 0.95, rates


@pytest.mark.parametrize("rate", [0.005, 0.02, 0.98])
def test_a_rare_outcome_in_a_small_arm_is_no_discovery(rate):
    """Arms of 9 to 1: the small arm's own variance would make 12 to 32 % of these experiments significant."""
    rates = simulate({"a": 9, "b": 1}, effect=0.0, spread=0.0, rate=rate, units=20_000, experiments=1_000, seed=6)
    assert rates.low <= 0.05, rates
    assert rates.significant <= 0.05, rates


def test_the_simulation_draws_the_standard_error_of_the_statistics():
    counts, successes = np.array([[900.0], [100.0]]), np.array([[45.0], [2.0]])
    estimate, error = simulation._difference(counts, successes, successes)
    arms = [moments.mean(Sums(int(n), y, y)) for n, y in zip(counts[:, 0], successes[:, 0], strict=True)]
    assert error[0] == pytest.approx(sequences.standard_error(*arms))
    assert estimate[0] == pytest.approx(arms[1].mean - arms[0].mean)


def test_an_effect_is_found_and_the_interval_holds_it_at_every_look():
    rates = simulate({"a": 3, "b": 1}, effect=0.15, spread=1.0, units=12_000, looks=40, experiments=1_000, seed=4)
    assert rates.significant >= 0.95, rates
    assert rates.covered >= 0.95, rates
    assert rates.mismatched <= 0.01, rates


def test_the_planned_units_are_those_after_which_the_interval_is_narrow_enough():
    planned = units_until(1.0, 0.15)
    assert half_width(2 / math.sqrt(planned), planned) <= 0.15 < half_width(2 / math.sqrt(planned - 1), planned - 1)
    rates = simulate({"a": 1, "b": 1}, effect=0.15, spread=1.0, units=2 * planned, looks=40, experiments=500, seed=5)
    assert rates.median_units < 1.2 * planned


@pytest.mark.parametrize("rate", [0.02, 0.5, 0.9])
def test_the_bounded_sequence_holds_with_few_units(rate):
    """The mean lies outside of the running interval in at most alpha of the series, from the first value on."""
    generator = np.random.default_rng(7)
    missed = 0
    for _ in range(400):
        low, high = bounded.mean_sequence((generator.random(60) < rate).astype(float), 0.05)
        missed += not low <= rate <= high
    assert bounds.wilson(missed, 400)[0] <= 0.05


def test_the_bounded_sequence_closes_in_on_the_mean_and_knows_the_scale():
    generator = np.random.default_rng(8)
    values = generator.beta(2, 6, 20_000)
    low, high = bounded.mean_sequence(values, 0.05)
    assert low <= 0.25 <= high
    assert high - low < 0.02
    scaled = bounded.mean_sequence(values * 4 - 1, 0.05, -1.0, 3.0)
    assert scaled == pytest.approx((4 * low - 1, 4 * high - 1))
    with pytest.raises(ValueError, match="outside"):
        bounded.mean_sequence([0.5, 1.5], 0.05)


def test_the_difference_of_two_bounded_arms_holds_the_true_one():
    generator = np.random.default_rng(9)
    low, high = bounded.difference_sequence(generator.random(4000) * 0.5, generator.random(4000), 0.05)
    assert low <= 0.25 <= high
    assert low > 0


# ---- decisions


def _difference(estimate: float, half: float, units: int = 1000) -> Difference:
    return Difference(estimate, estimate - half, estimate + half, 0.01, units, half / 3)


@pytest.mark.parametrize(
    ("estimate", "half", "higher_is_better", "state"),
    [
        (0.3, 0.1, True, "ship"),
        (0.3, 0.1, False, "roll back"),
        (-0.3, 0.1, True, "roll back"),
        (-0.3, 0.1, False, "ship"),
        (0.01, 0.05, True, "no difference"),
        (0.05, 0.2, True, "keep running"),
    ],
)
def test_the_decision_follows_from_the_interval(estimate, half, higher_is_better, state):
    decision = decide(_difference(estimate, half), 0.1, higher_is_better=higher_is_better)
    assert decision.state == state
    assert (decision.more_units > 0) == (state == "keep running")


def test_an_unhealthy_experiment_has_no_result_and_a_breached_guardrail_is_rolled_back():
    good = _difference(0.3, 0.1)
    assert decide(good, 0.1, unhealthy=("sample ratio mismatch",)).state == "unhealthy"
    assert decide(good, 0.1, breached=("error_rate",)).state == "roll back"


def test_too_few_units_decide_nothing_and_say_how_many_are_missing():
    result = difference(Estimate(60, 1.0, 1.0), Estimate(60, 5.0, 1.0))
    assert math.isnan(result.low)
    decision = decide(result, 0.1)
    assert decision.state == "keep running"
    assert decision.more_units == 80
    assert decide(result, 0.1, planned=6000).more_units == 5880


def test_a_metric_that_never_varied_decides_nothing():
    result = difference(Estimate(500, 1.0, 0.0), Estimate(500, 1.0, 0.0))
    assert decide(result, 0.1).state == "keep running"


def test_more_units_are_as_many_as_it_takes():
    running = difference(Estimate(600, 0.0, 1.0), Estimate(600, 0.1, 1.0))
    more = more_units(running, 0.05)
    after = sequences.half_width(2 / math.sqrt(1200 + more), 1200 + more)
    assert after == pytest.approx(0.1, rel=1e-3)
