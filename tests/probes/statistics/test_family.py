"""Many figures of the same items: p-values that hold for all of them together, and intervals of each."""

from __future__ import annotations

import pytest
import torch

from probes.statistics.family import family, step_down
from probes.statistics.paired import difference, student_quantile


def values(items: int, figures: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(items, figures, generator=torch.Generator().manual_seed(seed)).double()


def test_among_hundreds_of_figures_without_an_effect_there_is_none_and_one_with_an_effect_is_named() -> None:
    """Of 300 intervals without correction, about 15 exclude 0."""
    drawn = values(40, 300)
    drawn[:, 7] += 1.2
    found = family(drawn)
    assert [i for i, each in enumerate(found) if each.p_adjusted < 0.05] == [7]
    assert sum(each.low > 0 or each.high < 0 for each in found) > 5


def test_a_figure_that_stands_alone_has_the_interval_and_the_p_value_of_a_paired_difference() -> None:
    drawn = values(40, 1) + 0.3
    (found,) = family(drawn)
    alone = difference(drawn[:, 0])
    assert found.p_adjusted == pytest.approx(alone.p)
    assert (found.mean, found.low, found.high) == pytest.approx((alone.mean, alone.low, alone.high), abs=0.01)


def test_a_figure_of_which_few_items_differ_is_judged_as_a_paired_difference_is() -> None:
    drawn = torch.zeros(31, 1)
    drawn[:2] = torch.tensor([[1.0], [1.2]])
    (found,) = family(drawn)
    assert found.p_adjusted == pytest.approx(difference(drawn[:, 0]).p)
    assert found.low < 0 < found.high


def test_copies_of_one_figure_cost_no_power() -> None:
    drawn = values(40, 1) + 0.5
    (alone,) = family(drawn)
    assert {each.p_adjusted for each in family(drawn.expand(-1, 50))} == {alone.p_adjusted}


def test_a_figure_is_tested_against_a_distance_from_zero_on_either_side() -> None:
    drawn = values(40, 2) * 0.1 + torch.tensor([0.5, -0.5])
    assert all(each.p_adjusted < 0.01 for each in family(drawn, torch.tensor([0.4, 0.4])))
    assert all(each.p_adjusted > 0.1 for each in family(drawn, torch.tensor([0.5, 0.5])))


def test_a_single_item_has_no_interval_and_two_have_students() -> None:
    assert family(values(1, 2))[0][1:] == (None, None, None)
    drawn = torch.tensor([[1.0], [2.0]])
    (found,) = family(drawn)
    assert found.high - found.mean == pytest.approx(0.5 * student_quantile(0.95, 1))


def test_what_does_not_vary_is_an_effect_unless_it_is_zero() -> None:
    found = family(torch.tensor([[0.0, 0.1]] * 40))
    assert found[0] == (0.0, 0.0, 0.0, 1.0)
    assert found[1].p_adjusted < 0.01


def test_each_step_leaves_out_the_figures_that_were_greater() -> None:
    draws = torch.tensor([[1.0, 5.0], [3.0, 1.0], [2.0, 2.0]])
    assert step_down(torch.tensor([4.0, 2.5]), draws).tolist() == [2 / 4, 2 / 4]
    assert step_down(torch.tensor([2.5, 6.0]), draws).tolist() == [2 / 4, 1 / 4]
