"""The steps that merge methods share, as formulas on whole arrays: trim, random drop, sign election, disjoint mean.

They define the methods, and a GPU runs them: they take NumPy arrays and torch tensors alike. The compiled loops of
kernels.py, which run on CPUs, do the same operations in the same order on each element; a test compares their bits.
Rows are float32, as read; all sums are float64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", np.ndarray, "torch.Tensor")
GOLDEN = 0x9E3779B97F4A7C15  # the increment of SplitMix64


def _library(array: Any) -> Any:
    """The module numpy or torch that the array belongs to, without importing torch."""
    return sys.modules[type(array).__module__]


def wide(row: Array) -> Array:
    """The same numbers in float64."""
    values: Any = row
    return values.astype(np.float64) if isinstance(row, np.ndarray) else values.double()


def trim(values: Array, low: float, high: float) -> Array:
    """The values, with zero for magnitudes below `low` or above `high` (both float32)."""
    library = _library(values)
    magnitudes = abs(values)
    return library.where((magnitudes >= low) & (magnitudes <= high), values, library.zeros_like(values))


def random_drop(values: Array, index: Array, key: int, keep: float) -> Array:
    """Each value with probability `keep`, else zero; `index` (int64) are the elements' positions in the tensor."""
    library = _library(values)
    drawn = random_bits(index, key)
    return library.where(drawn < math.ceil(keep * 2.0**32), values, library.zeros_like(values))


def random_bits(index: Array, key: int) -> Array:
    """32 random bits for each position, int64: those of SplitMix64 (Steele, Lea and Flood 2014) at `key` and index.

    Each 64-bit output serves two neighbours, its lower half the one at the even position. Signed integers wrap as
    unsigned ones do.
    """
    x: Any = (index // 2 + 1) * _signed(GOLDEN) + _signed(key)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shifted(x, 31)
    return _library(index).where(index % 2 == 0, x & 0xFFFFFFFF, _shifted(x, 32))


def _shifted(x: Any, bits: int) -> Any:
    """The logical right shift x >> bits, which torch lacks for int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 with the bits of a uint64."""
    return x - (1 << 64) if x >= 1 << 63 else x


def weighted_sum(rows: Sequence[Array], weights: Sequence[float] | np.ndarray) -> Array:
    """The sum of weight * row, in float64, in the order of the rows."""
    total = wide(rows[0]) * weights[0]
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        total = total + wide(row) * weight
    return total


def elect_signs(rows: Sequence[Array], votes: Iterable[float], *, positive: bool = False) -> Array:
    """The elected sign of each element, as a float64 number of that sign: the sum of vote * row.

    It is zero where votes cancel, so that no sign is elected. With `positive` it is 1 or -1, and 1 where votes cancel.
    """
    total = _library(rows[0]).zeros_like(wide(rows[0]))
    for row, vote in zip(rows, votes, strict=True):
        total = total + wide(row) * vote
    if positive:
        ones = _library(total).ones_like(total)
        total = _library(total).where(total < 0, -ones, ones)
    return total


def disjoint_mean(rows: Sequence[Array], weights: Iterable[float], signs: Array, *, mean: bool = True) -> Array:
    """The weighted mean of those rows that agree with the elected sign, element by element; zero where none does.

    A negative weight adds the negated row, so it is the negated value that agrees or not. Without `mean`, their
    weighted sum.
    """
    library = _library(signs)
    nothing = library.zeros_like(signs)
    total, mass = nothing, nothing
    for row, weight in zip(rows, weights, strict=True):
        value = wide(row) * (float(weight > 0) - float(weight < 0))
        share = library.where(value * signs > 0, abs(weight), nothing)
        total = total + share * value
        mass = mass + share
    return total / library.where(mass > 0, mass, library.ones_like(mass)) if mean else total
