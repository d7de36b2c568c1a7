"""Intervals that cover at their stated rate, corrections against known values, slopes against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats

from probes.statistics.clusters import clusters_of, standard_error
from probes.statistics.correction import holm
from probes.statistics.paired import against_draws, difference, student_quantile, student_two_sided
from probes.statistics.proportions import design_effect, proportion
from probes.statistics.slopes import distribution, slopes, spearman

RUNS = 150


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def covered(draw: Callable[[torch.Generator], torch.Tensor], groups: list[str] | None = None) -> float:
    """How often the interval of data whose true mean is 0 holds it."""
    source, hits = generator(7), 0
    for run in range(RUNS):
        found = difference(draw(source), groups, seed=run)
        hits += found.low <= 0 <= found.high
    return hits / RUNS


def test_the_interval_of_a_mean_covers_at_its_stated_rate() -> None:
    assert 0.91 <= covered(lambda g: torch.randn(40, generator=g)) <= 0.99


def test_the_interval_covers_where_the_differences_are_skewed() -> None:
    assert 0.90 <= covered(lambda g: -torch.rand(40, generator=g).log() - 1) <= 0.99


def test_the_interval_covers_where_few_items_differ() -> None:
    """Two of 32 on average: in many resamples nothing varies, and leaving those out made the interval too narrow."""

    def draw(g: torch.Generator) -> torch.Tensor:
        return torch.sign(torch.randn(32, generator=g)) * (torch.rand(32, generator=g) < 0.06)

    assert covered(draw) >= 0.95


@pytest.mark.parametrize("few", [1, 2, 3])
def test_the_interval_is_in_units_of_the_differences_however_few_differ(few: int) -> None:
    """Rounding in resamples without variation gave 0.3 an interval of several millions."""
    ones = torch.zeros(32, dtype=torch.float64).index_fill(0, torch.arange(few), 1.0)
    unit = difference(ones)
    assert 0 < unit.high - unit.mean < 0.2
    for scale in (0.1, 0.3, -1 / 3, 7.7):
        found = difference(scale * ones)
        assert (found.high - found.mean) / abs(scale) == pytest.approx(unit.high - unit.mean)
        assert found.p == pytest.approx(unit.p)


KINDS: dict[str, Callable[[int, torch.Generator], torch.Tensor]] = {
    "normal": lambda n, g: torch.randn(n, generator=g),
    "skewed": lambda n, g: -torch.rand(n, generator=g).log() - 1 + 0.2 * torch.randn((), generator=g),
    "few differ": lambda n, g: (torch.rand(n, generator=g) < 4 / n).double() * (1 + 11 * torch.rand((), generator=g)),
    "votes": lambda n, g: torch.randint(-1, 2, (n,), generator=g).double() + 0.3 * (torch.rand(n, generator=g) < 0.5),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("confidence", [0.95, 1 - 0.05 / 3])
def test_the_p_value_is_below_the_level_exactly_where_the_interval_holds_no_zero(kind: str, confidence: float) -> None:
    source, level = generator(11), 1 - confidence
    for run in range(20):
        values = KINDS[kind](int(torch.randint(30, 60, (), generator=source)), source).double()
        found = difference(values, seed=run, confidence=confidence)
        if found.error == 0:
            continue
        # Shifted so that the interval ends about at zero, where the two could disagree.
        for factor in (0.999, 1.001):
            shifted = values - found.mean + factor * (found.high - found.mean)
            at = difference(shifted, seed=run, confidence=confidence)
            assert (at.p < level) == (at.low > 0) == (factor > 1), at
            if kind != "few differ":  # whose resamples hold few values, so that p-values are far apart
                assert at.p < 1.2 * level, at


def test_the_interval_is_not_narrower_than_students_t_where_one_item_differs() -> None:
    """Of 31 answers one was shorter: the interval ended a hundredth beyond zero, beside a p-value of 0.44."""
    one = torch.zeros(31, dtype=torch.float64).index_fill(0, torch.arange(1), -1.0)
    found = difference(one, confidence=1 - 0.05 / 3)
    half = stats.t.ppf(1 - 0.05 / 6, 30) / 31
    assert found.high - found.mean == pytest.approx(half, rel=1e-6)
    assert found.p >= 2 * stats.t.sf(1, 30)


def test_the_interval_covers_where_items_share_groups_and_would_not_without_them() -> None:
    groups = [str(i // 5) for i in range(60)]

    def draw(g: torch.Generator) -> torch.Tensor:
        return torch.randn(12, generator=g).repeat_interleave(5) + 0.6 * torch.randn(60, generator=g)

    assert 0.90 <= covered(draw, groups) <= 0.99
    assert covered(draw) < 0.80


def test_the_standard_error_without_groups_is_the_usual_one() -> None:
    values = torch.randn(50, generator=generator(), dtype=torch.float64)
    assert standard_error(clusters_of(values)) == pytest.approx(float(values.std() / math.sqrt(50)))
    alone = [str(i) for i in range(50)]
    assert standard_error(clusters_of(values, alone)) == pytest.approx(float(values.std() / math.sqrt(50)))


def test_items_that_are_copies_of_each_other_count_as_often_as_there_are_groups() -> None:
    values = torch.randn(40, generator=generator()).repeat_interleave(4)
    groups = [str(i // 4) for i in range(160)]
    assert design_effect(values, groups) == pytest.approx(4, rel=0.05)
    share, low, high = proportion((values > 0).double(), groups)
    _, low_of_40, high_of_40 = proportion((values[::4] > 0).double())
    assert (low, high) == (pytest.approx(low_of_40, abs=0.01), pytest.approx(high_of_40, abs=0.01))
    assert low < share < high


def test_the_interval_does_not_depend_on_the_order_of_items_beyond_its_resamples() -> None:
    values = torch.randn(40, generator=generator())
    groups = [str(i % 10) for i in range(40)]
    order = torch.randperm(40, generator=generator(1))
    first = difference(values, groups, seed=3)
    second = difference(values[order], [groups[i] for i in order.tolist()], seed=3)
    assert first.low == pytest.approx(second.low, abs=1e-9)


def test_equal_differences_have_an_interval_without_width() -> None:
    none = difference(torch.zeros(40))
    assert (none.mean, none.low, none.high, none.p) == (0, 0, 0, 1)
    some = difference(torch.full((40,), 0.5))
    assert (some.low, some.high) == (pytest.approx(0.5), pytest.approx(0.5))
    assert some.p < 1e-9


def test_one_item_says_nothing() -> None:
    found = difference(torch.tensor([1.0]))
    assert (found.low, found.high, found.p) == (-math.inf, math.inf, 1)


def test_against_draws_is_a_prediction_interval_for_one_more_draw() -> None:
    draws = torch.tensor([0.1, -0.2, 0.3, 0.0, -0.1])[:, None].expand(5, 50)
    subject = torch.full((50,), 0.4)
    found = against_draws(subject, draws)
    half = stats.t.ppf(0.975, 4) * float(draws.mean(1).std()) * math.sqrt(1 + 1 / 5)
    assert found.mean == pytest.approx(0.4 - 0.02, abs=1e-6)
    assert found.high - found.mean == pytest.approx(half, rel=1e-6)
    assert found.p == pytest.approx(2 * stats.t.sf(0.38 / (half / stats.t.ppf(0.975, 4)), 4), rel=1e-4)


def test_the_detectable_difference_from_draws_is_that_of_students_t() -> None:
    """Of four draws the test takes 3.2 times their distance; by normal quantiles 48 % would be found, not 80 %."""
    draws = torch.tensor([0.1, -0.2, 0.3, 0.0])[:, None].expand(4, 50)
    found = against_draws(torch.full((50,), 0.4), draws)
    between = float(draws.mean(1).std()) * math.sqrt(1 + 1 / 4)
    assert found.detectable == pytest.approx((stats.t.ppf(0.975, 3) + stats.t.ppf(0.8, 3)) * between, rel=1e-6)
    assert stats.nct.sf(stats.t.ppf(0.975, 3), 3, found.detectable / between) == pytest.approx(0.8, abs=0.03)


def test_students_t_has_its_tails_and_quantiles() -> None:
    for degrees in (1, 2, 3, 4, 7, 15, 16, 99):
        for value in (0.0, 0.3, -1.0, 2.5, 9.0):
            assert student_two_sided(value, degrees) == pytest.approx(2 * stats.t.sf(abs(value), degrees), abs=1e-12)
        assert student_quantile(0.95, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)


def test_the_detectable_effect_is_found_four_times_in_five() -> None:
    source, hits = generator(2), 0
    size = 2.8 / math.sqrt(50)  # (z of 5 % two-sided + z of 80 %) standard errors
    assert difference(torch.randn(50, generator=source)).detectable == pytest.approx(size, rel=0.3)
    for run in range(RUNS):
        hits += difference(size + torch.randn(50, generator=source), seed=run).p < 0.05
    assert 0.7 <= hits / RUNS <= 0.88


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_slope_is_that_of_the_line() -> None:
    strengths = [-1.0, 0.0, 0.5, 2.0]
    lines = torch.tensor([[2.0, -1.0, 0.0]]) * torch.tensor(strengths)[:, None] + torch.tensor([5.0, 1.0, -3.0])
    assert slopes(strengths, lines).tolist() == pytest.approx([2, -1, 0])
    noisy = lines + torch.randn(4, 3, generator=generator())
    for column in range(3):
        wanted = stats.linregress(strengths, noisy[:, column].numpy()).slope
        assert float(slopes(strengths, noisy)[column]) == pytest.approx(wanted, rel=1e-5)


def test_the_share_of_anti_steered_items_has_wilsons_interval() -> None:
    found = distribution(torch.tensor([1.0] * 27 + [-1.0] * 3))
    wilson = stats.binomtest(3, 30).proportion_ci(0.95, method="wilson")
    assert found.anti_steered == pytest.approx(0.1)
    assert (found.anti_steered_low, found.anti_steered_high) == pytest.approx((wilson.low, wilson.high))


def test_spearmans_correlation_with_ties() -> None:
    strengths, values = [-2.0, -1.0, 0.0, 1.0, 2.0], torch.tensor([1.0, 1.0, 3.0, 2.0, 5.0])
    assert spearman(strengths, values) == pytest.approx(stats.spearmanr(strengths, values.numpy()).statistic)
    assert spearman(strengths, torch.arange(5.0)) == pytest.approx(1)
    assert spearman(strengths, torch.ones(5)) == 0
