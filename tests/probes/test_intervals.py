"""Effect sizes and their intervals: closed forms, slow references, and coverage that holds what it says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from probes.intervals import CONFIDENCE, RESAMPLES, auroc, cohens_d, draw_resamples, interval, provable, supported

SCORES = st.lists(st.integers(-4, 4), min_size=1, max_size=12)  # few values, so that ties are common


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(positive: int, negative: int) -> Tensor:
    return torch.arange(positive + negative) < positive


def pairwise_auroc(positive: Tensor, negative: Tensor) -> float:
    """The definition: how often a positive lies above a negative, ties counted half."""
    above = (positive[:, None] > negative[None]).double() + (positive[:, None] == negative[None]).double() / 2
    return float(above.mean())


@given(positive=SCORES, negative=SCORES)
def test_auroc_is_the_share_of_pairs_in_the_right_order(positive: list[int], negative: list[int]) -> None:
    above, below = torch.tensor(positive).double(), torch.tensor(negative).double()
    assert auroc(above, below) == pytest.approx(pairwise_auroc(above, below), abs=1e-12)
    assert auroc(above, below) + auroc(below, above) == pytest.approx(1.0, abs=1e-12)


def test_auroc_of_scores_that_are_all_the_same_is_a_half() -> None:
    assert auroc(torch.ones(5), torch.ones(3)) == 0.5
    assert auroc(torch.ones(5), torch.zeros(3)) == 1.0
    assert auroc(torch.zeros(5), torch.ones(3)) == 0.0


@given(positive=SCORES, negative=SCORES, seed=st.integers(0, 5))
@settings(max_examples=15)
def test_the_interval_is_that_of_a_bootstrap_that_sorts_every_resample(
    positive: list[int], negative: list[int], seed: int
) -> None:
    scores = torch.tensor(positive + negative).double()
    labels = labels_of(len(positive), len(negative))
    counts = draw_resamples(labels, seed)
    values = []
    for drawn in counts.long():
        above = scores[labels].repeat_interleave(drawn[labels])
        below = scores[~labels].repeat_interleave(drawn[~labels]).sort().values
        ties_and_wins = torch.searchsorted(below, above) + torch.searchsorted(below, above, right=True)
        values.append(float(ties_and_wins.sum()) / 2 / len(above) / len(below))
    tail = (1 - CONFIDENCE) / 2
    slow = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    assert interval(scores, labels, counts) == tuple(slow.tolist())


def test_the_interval_does_not_depend_on_how_resamples_are_cut_into_pieces() -> None:
    scores, labels = normal(9_000), labels_of(5_000, 4_000)
    counts = draw_resamples(labels, 0)  # several pieces
    low, high = interval(scores, labels, counts)
    chosen = torch.randperm(9_000, generator=torch.Generator().manual_seed(1))
    assert interval(scores[chosen], labels[chosen], counts[:, chosen]) == (low, high)
    assert low < auroc(scores[labels], scores[~labels]) < high


def test_the_interval_covers_the_true_auroc_as_often_as_it_says() -> None:
    distance, each, rounds = 1.0, 40, 200
    truth = 0.5 * (1 + math.erf(distance / 2))  # Phi(d / sqrt 2) for two normals of deviation 1
    labels = labels_of(each, each)
    covered = 0
    for seed in range(rounds):
        low, high = interval(normal(2 * each, seed=seed) + distance * labels, labels, draw_resamples(labels, seed))
        covered += low <= truth <= high
    assert 0.88 <= covered / rounds <= 0.99


def test_an_interval_of_perfectly_separated_classes_is_a_point() -> None:
    labels = labels_of(6, 4)
    assert interval(labels.double(), labels, draw_resamples(labels, 0)) == (1.0, 1.0)


def test_few_groups_support_no_more_than_as_many_examples() -> None:
    """Four separated groups of ten examples gave a lower bound of 0.93, as if all examples were independent."""
    labels, groups = labels_of(40, 40), [f"g{i // 10}" for i in range(80)]
    counts = draw_resamples(labels, 0, groups)
    assert supported(labels.double(), labels, counts, groups) == (pytest.approx(0.025 ** (1 / 4)), 1.0)
    assert supported(labels.double(), labels, counts, [*groups[:40], *[""] * 40])[0] == pytest.approx(0.025 ** (1 / 4))
    assert supported(labels.double(), labels, counts)[0] == pytest.approx(0.025 ** (1 / 40))
    one = ["g"] * 80
    assert supported(labels.double(), labels, draw_resamples(labels, 0, one), one)[0] == pytest.approx(0.025)


def test_the_bound_of_separated_classes_is_exact() -> None:
    """With this share of the rarer class on the wrong side, just 2.5 % of draws show none of it."""
    least, greatest = provable(12, 40)
    assert greatest**12 == pytest.approx(0.025)
    assert least == pytest.approx(1 - greatest)
    assert provable(10**6, 10**6)[1] > 0.99999


def test_resamples_draw_each_class_apart_and_follow_from_the_seed() -> None:
    labels = torch.tensor([True, False, True, False, False])
    counts = draw_resamples(labels, 3)
    assert counts.shape == (RESAMPLES, 5)
    assert set(counts[:, labels].sum(1).tolist()) == {2.0}
    assert set(counts[:, ~labels].sum(1).tolist()) == {3.0}
    assert torch.equal(counts, draw_resamples(labels, 3))
    assert not torch.equal(counts, draw_resamples(labels, 4))
    # Each example is drawn as often as any other.
    assert (counts.double().mean(0) - 1).abs().max() < 0.1


# Cohen's d


def test_cohens_d_is_its_closed_form() -> None:
    positive, negative = torch.tensor([3.0, 5.0, 7.0]).double(), torch.tensor([0.0, 2.0]).double()
    pooled = math.sqrt((2 * 4.0 + 1 * 2.0) / (3 + 2 - 2))  # variances 4 and 2
    assert cohens_d(positive, negative) == pytest.approx((5.0 - 1.0) / pooled, rel=1e-12)
    assert cohens_d(negative, positive) == pytest.approx(-cohens_d(positive, negative), rel=1e-12)


@given(factor=st.floats(1e-3, 1e3), offset=st.floats(-1e3, 1e3))
def test_cohens_d_has_no_unit(factor: float, offset: float) -> None:
    a, b = normal(9, seed=1) + 1, normal(7, seed=2)
    assert cohens_d(a * factor + offset, b * factor + offset) == pytest.approx(cohens_d(a, b), rel=1e-6)


def test_cohens_d_without_any_spread_is_no_number_out_of_bounds() -> None:
    assert cohens_d(torch.ones(3), torch.ones(2)) == 0.0
    assert math.isfinite(cohens_d(torch.ones(1), torch.zeros(1)))


def test_the_examples_of_a_group_are_drawn_together_and_widen_the_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) < 60
    groups = [f"g{i % 12}" for i in range(120)]
    of_groups = torch.randn(12, generator=generator).double()[torch.arange(120) % 12]
    scores = of_groups * torch.where(labels, 1.0, -1.0) + labels + 0.1 * torch.randn(120, generator=generator)
    clustered, plain = draw_resamples(labels, 0, groups), draw_resamples(labels, 0)
    for i in range(12):
        assert bool((clustered[:, i::12] == clustered[:, i : i + 1]).all())
    (low, high), (least, greatest) = interval(scores, labels, clustered), interval(scores, labels, plain)
    assert high - low > 1.5 * (greatest - least)
    assert torch.equal(draw_resamples(labels, 0, [""] * 120), plain)
    alone = draw_resamples(torch.tensor([True, False]), 0, ["a", "b"])
    assert bool((alone > 0).all())  # a draw without a class is left out
