"""The fused pass itself: from the bits of mapped files to the bits of the result, tile by tile, in one compiled call.

A `Fusion` says what is done to each element; `apply` does it to values that are in memory already, and `merge` to what
lies on disk as it is. Both run the same loops on every element, so they give the same bits.

Numba keeps what it compiled until this file changes, and does not see when loops from kernels.py or floats.py do that
are compiled into it: touch this file then (a test that compares both paths fails until that is done).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from merges.engine import kernels
from merges.engine.floats import (
    OPTIONS,
    decode_bfloat16,
    decode_float16,
    decode_float32,
    encode_bfloat16,
    encode_float32,
    subtract_bfloat16,
)
from merges.engine.kernels import TILE

FEW = 8  # inputs for which loops are unrolled
KINDS = {"BF16": 0, "F16": 1, "F32": 2}
ALONE, LESS, MORE = 0, 1, 2  # an input as it is, minus the base, plus the base


class Fusion(NamedTuple):
    """scale * the weighted sum of factor * value, after trimming and dropping; with `votes`, of what agrees in sign.

    All arrays are [inputs]: `low` and `high` (float32) the magnitudes that stay, `keys` (uint64) and `keep` the random
    numbers and the chance of staying, `factors` what is left is multiplied by.
    """

    weights: np.ndarray
    factors: np.ndarray | None = None
    votes: np.ndarray | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    keys: np.ndarray | None = None
    keep: np.ndarray | None = None
    mean: bool = False
    positive: bool = False
    scale: float = 1.0

    def arrays(self) -> tuple[Any, ...]:
        """For `merge`, which takes no None: an empty array instead."""
        none, few = np.empty(0), np.empty(0, np.float32)
        return (
            *(none if array is None else array for array in (self.weights, self.factors, self.votes)),
            *(few if array is None else array for array in (self.low, self.high)),
            np.empty(0, np.uint64) if self.keys is None else self.keys,
            none if self.keep is None else self.keep,
            self.mean, self.positive, float(self.scale),
        )  # fmt: skip

    def few(self) -> tuple[tuple[float, ...] | None, ...] | None:
        """For `merge`, where there are few inputs: what each is multiplied by, as tuples; see `kernels.elect_few`.

        None where there are too many, or where it takes two roundings what one multiplication can't do.
        """
        factors = np.ones(len(self.weights)) if self.factors is None else self.factors
        if len(self.weights) > FEW:
            return None
        if self.votes is None:
            return _numbers(self.weights * factors), None, None
        if not (factors == 1).all() and not np.isin(self.votes, (-1, 0, 1)).all():
            return None
        voting, turned, heavy = self.votes * factors, factors * np.sign(self.weights), np.abs(self.weights)
        return (
            _numbers(voting),
            None if (turned == voting).all() else _numbers(turned),
            None if (heavy == 1).all() else _numbers(heavy),
        )


def _numbers(row: np.ndarray) -> tuple[float, ...]:
    return tuple(map(float, row))


class Direct(NamedTuple):
    """Where the inputs of a tensor lie in memory: addresses, kinds of numbers, and what the base does to each."""

    addresses: np.ndarray
    kinds: np.ndarray
    roles: np.ndarray
    base: Any  # an address, uint64; 0: there is none, or nothing needs it
    base_kind: int


def apply(fusion: Fusion, values: np.ndarray, start: int, out: np.ndarray) -> None:
    """Fill `out` [count] float64 from `values` [inputs, count] float32, which it changes; they begin at `start`."""
    _apply(values, *fusion.arrays(), start, out)


@njit(**OPTIONS)
def _apply(values, weights, factors, votes, low, high, keys, keep, mean, positive, scale, start, out):  # type: ignore[no-untyped-def]
    _select(values, low, high, keys, keep, start)
    if votes.size:
        kernels.elect(values, factors if factors.size else np.ones(weights.size), votes, weights, mean, positive, out)
    else:
        kernels.weighted_sum(values, weights * factors if factors.size else weights, out)
    _scale(out, scale)


@njit(**OPTIONS)
def _apply_few(values, votes, few, low, high, keys, keep, mean, positive, scale, start, out):  # type: ignore[no-untyped-def]
    _select(values, low, high, keys, keep, start)
    rows = values.reshape(-1)
    if votes.size:
        kernels.elect_few(rows, few[0], few[1], few[2], mean, positive, out)
    else:
        kernels.weighted_sum_few(rows, few[0], out)
    _scale(out, scale)


@njit(**OPTIONS)
def _select(values, low, high, keys, keep, start):  # type: ignore[no-untyped-def]
    if low.size:
        kernels.trim(values, low, high)
    if keys.size:
        kernels.drop(values, keys, keep, start)


@njit(**OPTIONS)
def _scale(out, scale):  # type: ignore[no-untyped-def]
    if scale != 1.0:
        for i in range(out.size):
            out[i] *= scale


@intrinsic
def _pointer(_context, address):  # type: ignore[no-untyped-def]
    def code(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), code


@njit(**OPTIONS)
def _load(address, kind, start, out):  # type: ignore[no-untyped-def]
    """The numbers [start, start + out.size) of a tensor at an address; False if one is not finite."""
    if kind == 2:
        return decode_float32(carray(_pointer(address + np.uint64(4 * start)), (out.size,), np.float32), out)
    raw = carray(_pointer(address + np.uint64(2 * start)), (out.size,), np.uint16)
    if kind == 1:
        return decode_float16(raw, out.view(np.uint32), out)
    return decode_bfloat16(raw, out)


@njit(**OPTIONS)
def _tile(addresses, kinds, roles, base, base_kind, start, values, below):  # type: ignore[no-untyped-def]
    """Read one tile of all inputs and the base; False if a number is not finite."""
    finite = True
    if base:
        finite &= _load(base, base_kind, start, below)
    for m in range(addresses.size):
        row = values[m]
        if kinds[m] == 0 and roles[m] == 1:
            raw = carray(_pointer(addresses[m] + np.uint64(2 * start)), (row.size,), np.uint16)
            finite &= subtract_bfloat16(raw, below, row)
            continue
        finite &= _load(addresses[m], kinds[m], start, row)
        if roles[m] == 1:
            for i in range(row.size):
                row[i] -= below[i]
        elif roles[m] == 2:
            for i in range(row.size):
                row[i] += below[i]
    return finite


@njit(**OPTIONS)
def merge(  # type: ignore[no-untyped-def]
    addresses, kinds, roles, base, base_kind,
    weights, factors, votes, low, high, keys, keep, mean, positive, scale, few, add, start, half, wide,
):  # fmt: skip
    """Elements from `start` on, as bfloat16 into `half` or as float32 into `wide`, of which the other is empty.

    `add` is 1 where the base is added to what comes out, -1 where it is taken from it. Answers False where a number is
    not finite or out of range, without saying which.
    """
    count = half.size + wide.size
    size = min(TILE, count)
    values, below, out = np.empty((addresses.size, size), np.float32), np.empty(size, np.float32), np.empty(size)
    good = True
    for first in range(0, count, TILE):
        if count - first < size:
            size = count - first
            values, below, out = (
                np.empty((addresses.size, size), np.float32),
                np.empty(size, np.float32),
                np.empty(size),
            )
        good &= _tile(addresses, kinds, roles, base, base_kind, start + first, values, below)
        if few is None or size < TILE:
            _apply(values, weights, factors, votes, low, high, keys, keep, mean, positive, scale, start + first, out)
        else:
            _apply_few(values, votes, few, low, high, keys, keep, mean, positive, scale, start + first, out)
        if add > 0:
            kernels.add(out, below)
        elif add < 0:
            for i in range(size):
                out[i] -= below[i]
        if half.size:
            good &= encode_bfloat16(out, half[first : first + size])
        else:
            own = wide[first : first + size]
            good &= encode_float32(out, own.view(np.uint32), own)
    return good


@njit(**OPTIONS)
def sample(addresses, kinds, roles, base, base_kind, starts, size, out):  # type: ignore[no-untyped-def]
    """The values of `size` elements from each of `starts` on, finite or not: out is [inputs, starts * size]."""
    values, below = np.empty((addresses.size, size), np.float32), np.empty(size, np.float32)
    for j in range(starts.size):
        _tile(addresses, kinds, roles, base, base_kind, starts[j], values, below)
        out[:, j * size : (j + 1) * size] = values


@njit(**OPTIONS)
def split(addresses, kinds, roles, base, base_kind, start, stop, lows, highs, counts, found):  # type: ignore[no-untyped-def]
    """kernels.split over [start, stop); False if a number is not finite or there is no room for what is found."""
    size = min(TILE, stop - start)
    values, below = np.empty((addresses.size, size), np.float32), np.empty(size, np.float32)
    flags, marked = np.zeros((size + 7) // 8 * 8, np.uint8), np.empty((size + 7) // 8 + 1, np.int64)
    for first in range(start, stop, TILE):
        if stop - first < size:
            size = stop - first
            values, below = np.empty((addresses.size, size), np.float32), np.empty(size, np.float32)
            flags = np.zeros((size + 7) // 8 * 8, np.uint8)
        if not _tile(addresses, kinds, roles, base, base_kind, first, values, below):
            return False
        if not kernels.split(values, lows, highs, flags, marked, counts, found):
            return False
    return True


@njit(**OPTIONS)
def coarse(addresses, kinds, roles, base, base_kind, start, stop, tables):  # type: ignore[no-untyped-def]
    """kernels.coarse over [start, stop); False if a number is not finite."""
    good = True
    size = min(TILE, stop - start)
    values, below = np.empty((addresses.size, size), np.float32), np.empty(size, np.float32)
    for first in range(start, stop, TILE):
        if stop - first < size:
            size = stop - first
            values, below = np.empty((addresses.size, size), np.float32), np.empty(size, np.float32)
        good &= _tile(addresses, kinds, roles, base, base_kind, first, values, below)
        kernels.coarse(values.view(np.uint32), tables)
    return good


@njit(**OPTIONS)
def fine(addresses, kinds, roles, base, base_kind, start, stop, buckets, used, tables):  # type: ignore[no-untyped-def]
    """kernels.fine over [start, stop); False if a number is not finite."""
    good = True
    size = min(TILE, stop - start)
    values, below = np.empty((addresses.size, size), np.float32), np.empty(size, np.float32)
    for first in range(start, stop, TILE):
        if stop - first < size:
            size = stop - first
            values, below = np.empty((addresses.size, size), np.float32), np.empty(size, np.float32)
        good &= _tile(addresses, kinds, roles, base, base_kind, first, values, below)
        kernels.fine(values.view(np.uint32), buckets, used, tables)
    return good
