"""A preference for an answer cancels, whatever the numbers of items with each answer; the error is the right one."""

from __future__ import annotations

import pytest
import torch

from probes.statistics.paired import difference
from probes.statistics.strata import FEWEST, answer_strata, balanced, by_stratum


def test_the_mean_counts_each_answer_once() -> None:
    values = torch.tensor([1.0, 3.0, -4.0, 5.0, 6.0, 7.0])
    strata = ["yes", "yes", "no", "yes", "no", "no"]
    assert float(balanced(values, strata).mean()) == pytest.approx((3.0 + 3.0) / 2)
    assert by_stratum(values, strata) == {"yes": 3.0, "no": 3.0}


def test_a_preference_for_an_answer_cancels_to_the_bit_of_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    effects = torch.randn(50, generator=generator, dtype=torch.float64)
    strata = ["yes"] * 33 + ["no"] * 17
    bias = torch.tensor([1.0] * 33 + [-1.0] * 17, dtype=torch.float64)
    torch.testing.assert_close(balanced(effects + 3 * bias, strata), balanced(effects, strata))


def test_the_map_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    strata = ["a"] * 9 + ["b"] * 11
    torch.testing.assert_close(balanced(one - other, strata), balanced(one, strata) - balanced(other, strata))
    torch.testing.assert_close(balanced(torch.stack([one, other]), strata)[1], balanced(other, strata))


def test_the_standard_error_is_that_of_the_mean_of_the_means() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(60, generator=generator, dtype=torch.float64)
    values[:40] = 3 * values[:40] + 5
    found = balanced(values, ["yes"] * 40 + ["no"] * 20)
    squares = values[:40].var() / 40 + values[40:].var() / 20
    # Over n rather than n - 1: the strata's own variances are unbiased already.
    assert float((found.var(correction=0) / 60).sqrt()) == pytest.approx(float(squares.sqrt()) / 2)


def test_intervals_cover_at_their_rate_beside_a_strong_preference() -> None:
    covered, wide, narrow = 0, 0.0, 0.0
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        yes = torch.rand(64, generator=generator) < 0.5
        values = 0.1 + 0.3 * torch.randn(64, generator=generator) + 1.2 * torch.where(yes, 1.0, -1.0)
        strata = ["yes" if each else "no" for each in yes]
        found = difference(balanced(values, strata), seed=seed)
        covered += found.low <= 0.1 <= found.high
        narrow += found.high - found.low
        if seed < 20:
            plain = difference(values, seed=seed)
            wide += plain.high - plain.low
    # 95 % of 400, and three standard errors of that share.
    assert 0.917 * 400 <= covered <= 0.983 * 400
    assert narrow / 400 < 0.4 * wide / 20


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        (["yes"] * 20, [["no"]] * 20),  # one answer is always the positive one
        (["yes"] * 20 + ["no"] * (FEWEST - 1), [["no"]] * 20 + [["yes"]] * (FEWEST - 1)),  # too few of the other
        ([f"text {i}" for i in range(20)], [["no"]] * 20),  # free text
        (["yes"] * 10 + ["no"] * 10, [["no"]] * 10 + [["perhaps"]] * 10),  # other answers
        ([], []),
    ],
)
def test_nothing_is_balanced_where_answers_are_no_rivals(positive: list[str], negative: list[list[str]]) -> None:
    assert answer_strata(positive, negative) is None


def test_yes_and_no_are_balanced() -> None:
    positive, negative = ["yes"] * 6 + ["no"] * 5, [["no"]] * 6 + [["yes"]] * 5
    assert answer_strata(positive, negative) == positive
    values = torch.randn(11)
    assert balanced(values, None).tolist() == values.double().tolist()
