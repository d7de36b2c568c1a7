"""Intervals of shares: they cover at their stated rate where items share groups, however alike the items are."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from probes.statistics.proportions import design_effect, proportion


def of_groups(hits: list[int], size: int) -> tuple[torch.Tensor, list[str]]:
    """So many hits in each group of one size, and the group of each item."""
    values = [1.0 if i < each else 0.0 for each in hits for i in range(size)]
    return torch.tensor(values), [str(group) for group in range(len(hits)) for _ in range(size)]


@pytest.mark.parametrize("groups", [8, 12, 20, 40])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.3, 0.5])
def test_the_interval_of_a_share_covers_where_the_items_of_a_group_are_identical(groups: int, share: float) -> None:
    covered = 0.0
    for hits in range(groups + 1):
        _, low, high = proportion(*of_groups([5] * hits + [0] * (groups - hits), 5))
        covered += stats.binom.pmf(hits, groups, share) * (low <= share <= high)
    assert covered >= 0.93


@pytest.mark.parametrize(("groups", "share"), [(8, 0.1), (20, 0.1), (20, 0.3)])
def test_it_covers_where_they_are_independent_or_only_alike(groups: int, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for alike in (0.0, 0.5):  # the probability that an item repeats the first one of its group
        covered = 0
        for _ in range(300):
            drawn = torch.rand(groups, 5, generator=generator) < share
            repeats = torch.rand(groups, 5, generator=generator) < alike
            hits = torch.where(repeats, drawn[:, :1], drawn).sum(1).tolist()
            _, low, high = proportion(*of_groups(hits, 5))
            covered += low <= share <= high
        assert covered / 300 >= 0.93


def test_where_all_items_agree_there_are_as_many_as_groups() -> None:
    values, groups = of_groups([0] * 12, 5)
    assert design_effect(values, groups) == pytest.approx(5)
    _, _, of_12 = proportion(torch.zeros(12))
    assert proportion(values, groups)[2] >= of_12
    uneven = [*["large"] * 20, *map(str, range(20))]  # 40 items that tell as much as 40^2 / (20^2 + 20) = 3.8
    assert 40 / design_effect(torch.zeros(40), uneven) == pytest.approx(1600 / 420)


def test_many_groups_of_independent_items_are_hardly_wider_than_the_items_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    values, groups = (torch.rand(200, generator=generator) < 0.3).double(), [str(i // 5) for i in range(200)]
    (_, low, high), (_, low_alone, high_alone) = proportion(values, groups), proportion(values)
    assert 1 <= (high - low) / (high_alone - low_alone) < 1.2


def test_groups_of_one_item_change_nothing_and_a_single_group_says_nothing() -> None:
    values = torch.tensor([1.0] * 3 + [0.0] * 27)
    assert proportion(values, [str(i) for i in range(30)]) == proportion(values)
    assert proportion(values, ["all"] * 30) == (pytest.approx(0.1), 0.0, 1.0)
    assert proportion(torch.ones(1), ["one"]) == proportion(torch.ones(1))
