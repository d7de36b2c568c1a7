"""The k-th greatest magnitude is found exactly, in one tensor and over many, whatever the values."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merges import selection, tensor
from merges.pool import Pool
from merges.readers import Array
from merges.tensor import Input, Tensor

PLAIN = SimpleNamespace(SPACE="weight")


def make(arrays: list[np.ndarray], pool: Pool) -> Tensor:
    inputs = tuple(Input(f"m{i}", Array(a), False) for i, a in enumerate(arrays))
    return Tensor("w", arrays[0].shape, "F32", inputs, None, PLAIN, pool)  # type: ignore[arg-type]


@given(
    seed=st.integers(0, 999),
    size=st.integers(1, 3000),
    kind=st.sampled_from(["wide", "few", "zeros", "near"]),
    chunk=st.sampled_from([7, 64, 1 << 15]),
)
def test_it_is_what_sorting_finds(seed: int, size: int, kind: str, chunk: int) -> None:
    draw = np.random.default_rng(seed)
    values = draw.standard_normal((2, size)) * 10.0 ** draw.integers(-42, 30, (2, size))
    if kind == "few":
        values = np.round(draw.standard_normal((2, size)) * 2)
    if kind == "zeros":
        values *= draw.random((2, size)) < 0.3
    if kind == "near":
        values = 1 + draw.integers(0, 50, (2, size)) * 2.0**-23
    arrays = list(values.astype(np.float32))
    ranks = [sorted({1, size, int(draw.integers(1, size + 1))} | {max(size // 2, 1)})] * 2
    before = tensor.CHUNK, tensor.GROUP
    tensor.CHUNK, tensor.GROUP = chunk, 4 * chunk  # so that small tensors have many pieces
    try:
        with Pool(2) as pool:
            found = selection.magnitudes([make(arrays, pool)], ranks)
    finally:
        tensor.CHUNK, tensor.GROUP = before
    for row, array in enumerate(arrays):
        ordered = np.sort(np.abs(array))[::-1]
        np.testing.assert_array_equal(found[row], [ordered[rank - 1] for rank in ranks[row]])


@pytest.mark.parametrize("sizes", [(5, 1, 300), (40000, 70000, 3)])
def test_over_several_tensors_it_is_that_of_the_flattened_model(sizes: tuple[int, ...]) -> None:
    draw = np.random.default_rng(0)
    arrays = [
        [(s * draw.standard_normal(n)).astype(np.float32) for _ in range(2)]
        for n, s in zip(sizes, (1, 0.1, 3), strict=True)
    ]
    total = sum(sizes)
    with Pool(2) as pool:
        found = selection.magnitudes([make(pair, pool) for pair in arrays], [[1, total // 5], [total // 2, total]])
    for row, ranks in enumerate(([1, total // 5], [total // 2, total])):
        ordered = np.sort(np.abs(np.concatenate([pair[row] for pair in arrays])))[::-1]
        np.testing.assert_array_equal(found[row], [ordered[rank - 1] for rank in ranks])
