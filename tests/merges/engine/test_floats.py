"""Reading bits is exact, and writing rounds once, to nearest even."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merges.engine import floats

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_pattern_of_16_bits_is_read_as_torch_reads_it(dtype: str) -> None:
    raw = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(raw.view(np.int16).copy()).view(DTYPES[dtype]).float().numpy()
    finite = np.isfinite(expected)
    out = np.empty(raw.size, np.float32)
    assert floats.decode(raw, dtype, out) is False
    np.testing.assert_array_equal(out[finite].view(np.uint32), expected[finite].view(np.uint32))
    for pattern, good in zip(raw, finite, strict=True):
        if not good:
            assert floats.decode(np.array([pattern]), dtype, np.empty(1, np.float32)) is False
    assert floats.decode(raw[finite], dtype, np.empty(int(finite.sum()), np.float32)) is True


def nearest_even(value: float, dtype: str) -> float:
    """The nearest number of the dtype, by search: of two equally near, the one whose last bit is zero."""
    raw = np.arange(1 << 15, dtype=np.uint16)
    table = np.empty(raw.size, np.float32)
    floats.decode(raw, dtype, table)
    limit = {"BF16": 0x7F80, "F16": 0x7C00}[dtype]
    known = table[:limit].astype(np.float64)
    place = int(np.searchsorted(known, abs(value)))
    candidates = [i for i in (place - 1, place) if 0 <= i < limit]
    best = min(candidates, key=lambda i: (abs(known[i] - abs(value)), i % 2))
    return float(np.copysign(known[best], value))


@given(
    value=st.one_of(st.floats(-6e4, 6e4), st.floats(-1e-4, 1e-4), st.floats(-1e-39, 1e-39)),
    dtype=st.sampled_from(["BF16", "F16"]), nudge=st.sampled_from([0.0, 1e-12, -1e-12]), middle=st.booleans(),
)  # fmt: skip
def test_float64_is_rounded_once_to_nearest_even(value: float, dtype: str, nudge: float, middle: bool) -> None:
    if middle:  # between two neighbours, where rounding twice goes wrong
        low = nearest_even(value, dtype)
        raw = np.array([low], np.float32 if dtype == "BF16" else np.float16).view(
            np.uint32 if dtype == "BF16" else np.uint16
        )
        next_up = (raw + (0x10000 if dtype == "BF16" else 1)).view(np.float32 if dtype == "BF16" else np.float16)[0]
        value = (low + float(next_up)) / 2
    value *= 1 + nudge
    out = np.empty(1, np.uint16)
    assert floats.encode(np.array([value]), dtype, out)
    assert floats.to_float32(out, dtype)[0] == np.float32(nearest_even(value, dtype))


def test_float32_is_kept_and_overflow_is_seen() -> None:
    values = np.array([1e-45, -0.0, 3.4e38, 1 + 2**-24 + 2**-50])
    out = np.empty(4, np.float32)
    assert floats.encode(values, "F32", out)
    np.testing.assert_array_equal(out.view(np.uint32), values.astype(np.float32).view(np.uint32))
    for dtype, large in (("F32", 3.5e38), ("BF16", 3.4e38), ("F16", 65520.0), ("BF16", np.nan)):
        assert not floats.encode(np.array([large]), dtype, np.empty(1, floats.storage(dtype)))
