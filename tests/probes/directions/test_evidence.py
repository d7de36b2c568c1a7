"""Moments that stream: however rows are cut and merged, the result is that of all rows at once."""

from __future__ import annotations

from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probes.directions.evidence import Evidence, Moments, merged

HIDDEN = 3
LONG = np.longdouble
ROWS = st.lists(st.lists(st.integers(-1000, 1000), min_size=HIDDEN, max_size=HIDDEN), min_size=2, max_size=24)


def rows_of(count: int, offset: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, HIDDEN, generator=generator) + offset


def exact(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scatter in rational arithmetic, rounded once at the end."""
    values = [[Fraction(float(x)) for x in row] for row in rows]
    n = len(values)
    mean = [sum((row[i] for row in values), Fraction(0)) / n for i in range(rows.shape[1])]
    scatter = [
        [float(sum(((row[i] - mean[i]) * (row[j] - mean[j]) for row in values), Fraction(0))) for j in range(len(mean))]
        for i in range(len(mean))
    ]
    return torch.tensor([float(m) for m in mean], dtype=torch.float64), torch.tensor(scatter, dtype=torch.float64)


def assert_same(a: Moments, b: Moments) -> None:
    assert a.count == b.count
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-13, atol=1e-10)
    assert (a.scatter is None) == (b.scatter is None)
    if a.scatter is not None:
        torch.testing.assert_close(a.scatter, b.scatter, rtol=1e-12, atol=1e-7)


@given(values=ROWS, data=st.data())
def test_any_split_merged_in_any_order_gives_what_all_rows_give_at_once(
    values: list[list[int]], data: st.DataObject
) -> None:
    rows = torch.tensor(values, dtype=torch.float32)
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows))))
    parts = [
        Moments.of(rows[labels == part], True)
        for part in data.draw(st.permutations(range(5)))
        if (labels == part).any()
    ]
    at_once = Moments.of(rows, True)
    assert_same(merged(parts), at_once)
    assert_same(reduce(lambda a, b: b.merge(a), parts), at_once)


@given(values=ROWS, cut=st.integers(1, 23), again=st.integers(1, 23))
def test_merging_is_associative_and_commutative(values: list[list[int]], cut: int, again: int) -> None:
    rows = torch.tensor(values, dtype=torch.float32)
    first, last = sorted((min(cut, len(rows) - 1), min(again, len(rows) - 1)))
    parts = [Moments.of(part, True) for part in (rows[:first], rows[first:last], rows[last:]) if len(part)]
    if len(parts) == 3:
        a, b, c = parts
        assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_same(parts[0].merge(parts[1]), parts[1].merge(parts[0]))


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_large_common_offset_costs_no_precision(offset: float) -> None:
    rows = rows_of(400, offset)
    mean, scatter = exact(rows)
    streamed = merged(Moments.of(part, True) for part in rows.split(7))
    assert streamed.scatter is not None
    assert torch.allclose(streamed.mean, mean, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(streamed.scatter, scatter, rtol=1e-9, atol=1e-9)


def test_sums_of_squares_would_not_have_done() -> None:
    rows = rows_of(400, 1e6)
    _, scatter = exact(rows)
    single = rows.T @ rows - torch.outer(rows.sum(0), rows.sum(0)) / len(rows)
    assert not torch.allclose(single.double(), scatter, rtol=0.1)


def test_row_by_row_is_as_good_as_extended_precision() -> None:
    rows = rows_of(2_000, 1e6, seed=3)
    wide = rows.numpy().astype(LONG)
    centred = wide - wide.mean(0)
    streamed = merged(Moments.of(row[None], True) for row in rows)
    assert streamed.scatter is not None
    np.testing.assert_allclose(streamed.mean.numpy(), wide.mean(0).astype(float), rtol=1e-14)
    np.testing.assert_allclose(streamed.scatter.numpy(), (centred.T @ centred).astype(float), rtol=1e-7, atol=1e-5)


def test_half_precision_rows_are_summed_in_double() -> None:
    rows = torch.full((5_000, 2), 0.1, dtype=torch.bfloat16)
    moments = Moments.of(rows)
    assert moments.mean.dtype == torch.float64
    assert torch.allclose(moments.mean, rows[0].double(), rtol=1e-12)


def test_second_moments_are_kept_only_where_asked_for() -> None:
    rows = rows_of(8, 0.0)
    assert Moments.of(rows).scatter is None
    assert Moments.of(rows, True).merge(Moments.of(rows)).scatter is None


def test_the_scatter_is_that_of_numpy() -> None:
    rows = rows_of(50, 2.0)
    scatter = Moments.of(rows, True).scatter
    assert scatter is not None
    np.testing.assert_allclose(scatter.numpy() / 50, np.cov(rows.double().numpy().T, bias=True), rtol=1e-10)


def test_no_parts_have_no_moments() -> None:
    with pytest.raises(ValueError, match="no moments"):
        merged([])


def test_the_displacement_points_from_negative_to_positive() -> None:
    up, down = Moments.of(torch.tensor([[1.0, 5.0]])), Moments.of(torch.tensor([[0.0, 2.0]]))
    assert Evidence(up, down).displacement.tolist() == [1.0, 3.0]
