"""The fused pass: from the bits of mapped files to the bits of the result, tile by tile, in one compiled call.

An `Elementwise` is the formula of each element; `apply` computes it from values in memory, `merge` from mapped files.
Both run the same loops on every element, so they give the same bits.

Numba caches what it compiled until this file changes, but does not notice changes of kernels.py or floats.py, whose
loops are compiled into it: edit this file too then (a test that compares both paths fails otherwise).
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

FEW = 8  # the most inputs for which loops are unrolled
KINDS = {"BF16": 0, "F16": 1, "F32": 2}
AS_IS, MINUS_BASE, PLUS_BASE = 0, 1, 2  # how the values of an input are read


class Elementwise(NamedTuple):
    """A formula for each element: scale * the weighted sum of factor * value, after trimming and random dropping.

    With `votes` a sign is elected first, and only the values that agree with it are summed, or averaged if `mean`. All
    arrays are [inputs], and float64 unless stated.
    """

    weights: np.ndarray
    factors: np.ndarray | None = None  # what the remaining values of each input are multiplied by
    votes: np.ndarray | None = None  # the weight of each input's values in the election
    low: np.ndarray | None = None  # float32: smaller magnitudes are trimmed
    high: np.ndarray | None = None  # float32: greater magnitudes are trimmed
    keys: np.ndarray | None = None  # uint64: the keys of the random numbers of a random drop
    keep: np.ndarray | None = None  # the probability that a random drop keeps a value
    mean: bool = False  # the weighted mean of the agreeing values, not their sum
    positive: bool = False  # + is elected where the votes cancel, instead of no sign
    scale: float = 1.0

    def filled(self) -> Filled:
        """For the compiled loops: an empty array in place of each None."""

        def filled(array: np.ndarray | None, dtype: Any = np.float64) -> np.ndarray:
            return np.empty(0, dtype) if array is None else array

        return Filled(
            self.weights,
            filled(self.factors),
            filled(self.votes),
            filled(self.low, np.float32),
            filled(self.high, np.float32),
            filled(self.keys, np.uint64),
            filled(self.keep),
            self.mean,
            self.positive,
            float(self.scale),
        )

    def unrolled(self) -> tuple[tuple[float, ...] | None, ...] | None:
        """For few inputs, the multipliers that `merge` takes, as tuples; see `kernels.elect_few`.

        None for more inputs than FEW, or where vote * factor would be rounded otherwise than in `kernels.elect`.
        """
        factors = np.ones(len(self.weights)) if self.factors is None else self.factors
        if len(self.weights) > FEW:
            return None
        if self.votes is None:
            return _numbers(self.weights * factors), None, None
        if not (factors == 1).all() and not np.isin(self.votes, (-1, 0, 1)).all():
            return None
        vote_factors, signed_factors = self.votes * factors, factors * np.sign(self.weights)
        weight_sizes = np.abs(self.weights)
        return (
            _numbers(vote_factors),
            None if (signed_factors == vote_factors).all() else _numbers(signed_factors),
            None if (weight_sizes == 1).all() else _numbers(weight_sizes),
        )


class Filled(NamedTuple):
    """An Elementwise with empty arrays for None, so that the loops are compiled for one set of types."""

    weights: np.ndarray
    factors: np.ndarray
    votes: np.ndarray
    low: np.ndarray
    high: np.ndarray
    keys: np.ndarray
    keep: np.ndarray
    mean: bool
    positive: bool
    scale: float


def _numbers(row: np.ndarray) -> tuple[float, ...]:
    return tuple(map(float, row))


class MappedInputs(NamedTuple):
    """The addresses of the inputs of a tensor in mapped files. All arrays are [inputs]."""

    addresses: np.ndarray  # uint64
    kinds: np.ndarray  # int64: their dtypes, as in KINDS
    roles: np.ndarray  # int64: AS_IS, MINUS_BASE or PLUS_BASE
    base: Any  # the address of the base, a NumPy uint64; 0 if there is none, or if nothing needs it
    base_kind: int


def apply(formula: Elementwise, values: np.ndarray, start: int, out: np.ndarray) -> None:
    """Fill `out` [count] float64 from `values` [inputs, count] float32, which are overwritten.

    `start` is the index of the first value in its tensor, which determines its random numbers.
    """
    _apply(values, formula.filled(), start, out)


@njit(**OPTIONS)
def _apply(values, formula, start, out):  # type: ignore[no-untyped-def]
    """The result of a tile or a piece, for any number of inputs."""
    _drop(values, formula, start)
    weights, factors = formula.weights, formula.factors
    if formula.votes.size:
        each = factors if factors.size else np.ones(weights.size)
        kernels.elect(values, each, formula.votes, weights, formula.mean, formula.positive, out)
    else:
        kernels.weighted_sum(values, weights * factors if factors.size else weights, out)
    _scale(out, formula.scale)


@njit(**OPTIONS)
def _apply_few(values, formula, unrolled, start, out):  # type: ignore[no-untyped-def]
    """The same as `_apply`, for a whole tile of a few inputs."""
    _drop(values, formula, start)
    rows = values.reshape(-1)
    if formula.votes.size:
        kernels.elect_few(rows, unrolled[0], unrolled[1], unrolled[2], formula.mean, formula.positive, out)
    else:
        kernels.weighted_sum_few(rows, unrolled[0], out)
    _scale(out, formula.scale)


@njit(**OPTIONS)
def _drop(values, formula, start):  # type: ignore[no-untyped-def]
    """Set to zero, in place, the values that are trimmed or dropped at random."""
    if formula.low.size:
        kernels.trim(values, formula.low, formula.high)
    if formula.keys.size:
        kernels.drop(values, formula.keys, formula.keep, start)


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
def _tile(inputs, start, values, base):  # type: ignore[no-untyped-def]
    """Read one tile of all inputs and the base; False if a number is not finite."""
    finite = True
    addresses, kinds, roles = inputs.addresses, inputs.kinds, inputs.roles
    if inputs.base:
        finite &= _load(inputs.base, inputs.base_kind, start, base)
    for m in range(addresses.size):
        row = values[m]
        if kinds[m] == 0 and roles[m] == MINUS_BASE:
            raw = carray(_pointer(addresses[m] + np.uint64(2 * start)), (row.size,), np.uint16)
            finite &= subtract_bfloat16(raw, base, row)
            continue
        finite &= _load(addresses[m], kinds[m], start, row)
        if roles[m] == MINUS_BASE:
            for i in range(row.size):
                row[i] -= base[i]
        elif roles[m] == PLUS_BASE:
            for i in range(row.size):
                row[i] += base[i]
    return finite


@njit(**OPTIONS)
def merge(inputs, formula, unrolled, add, start, bfloat16, float32):  # type: ignore[no-untyped-def]
    """Fill `bfloat16` (uint16, the bits) or `float32`, of which the other is empty, with elements from `start` on.

    `inputs` is a MappedInputs, `formula` a Filled, `unrolled` comes from Elementwise.unrolled. `add` is 1 if the base
    is added to the result, -1 if it is subtracted, else 0. Returns False if any number is not finite or out of range.
    """
    count = bfloat16.size + float32.size
    size = min(TILE, count)
    values, base, out = np.empty((inputs.addresses.size, size), np.float32), np.empty(size, np.float32), np.empty(size)
    finite = True
    for first in range(0, count, TILE):
        if count - first < size:
            size = count - first
            values, base, out = (
                np.empty((inputs.addresses.size, size), np.float32),
                np.empty(size, np.float32),
                np.empty(size),
            )
        finite &= _tile(inputs, start + first, values, base)
        if unrolled is None or size < TILE:
            _apply(values, formula, start + first, out)
        else:
            _apply_few(values, formula, unrolled, start + first, out)
        if add > 0:
            kernels.add(out, base)
        elif add < 0:
            for i in range(size):
                out[i] -= base[i]
        if bfloat16.size:
            finite &= encode_bfloat16(out, bfloat16[first : first + size])
        else:
            target = float32[first : first + size]
            finite &= encode_float32(out, target.view(np.uint32), target)
    return finite


# The three passes below repeat one loop over tiles. As a generator it was 10 to 20 % slower, since Numba keeps the
# state of a generator in memory, and a function passed as an argument is compiled again in every process.


@njit(**OPTIONS)
def sample(inputs, starts, size, out):  # type: ignore[no-untyped-def]
    """Fill `out` [inputs, starts * size] with the `size` elements from each of `starts` on, finite or not."""
    values, base = np.empty((inputs.addresses.size, size), np.float32), np.empty(size, np.float32)
    for j in range(starts.size):
        _tile(inputs, starts[j], values, base)
        out[:, j * size : (j + 1) * size] = values


@njit(**OPTIONS)
def split(inputs, start, stop, lows, highs, counts, within):  # type: ignore[no-untyped-def]
    """kernels.split over [start, stop); False if a number is not finite, or if `within` has no room left."""
    size = min(TILE, stop - start)
    values, base = np.empty((inputs.addresses.size, size), np.float32), np.empty(size, np.float32)
    flags, marked = np.zeros((size + 7) // 8 * 8, np.uint8), np.empty((size + 7) // 8 + 1, np.int64)
    for first in range(start, stop, TILE):
        if stop - first < size:
            size = stop - first
            values, base = np.empty((inputs.addresses.size, size), np.float32), np.empty(size, np.float32)
            flags = np.zeros((size + 7) // 8 * 8, np.uint8)
        if not _tile(inputs, first, values, base):
            return False
        if not kernels.split(values, lows, highs, flags, marked, counts, within):
            return False
    return True


@njit(**OPTIONS)
def coarse(inputs, start, stop, tables):  # type: ignore[no-untyped-def]
    """kernels.coarse over [start, stop); False if a number is not finite."""
    finite = True
    size = min(TILE, stop - start)
    values, base = np.empty((inputs.addresses.size, size), np.float32), np.empty(size, np.float32)
    for first in range(start, stop, TILE):
        if stop - first < size:
            size = stop - first
            values, base = np.empty((inputs.addresses.size, size), np.float32), np.empty(size, np.float32)
        finite &= _tile(inputs, first, values, base)
        kernels.coarse(values.view(np.uint32), tables)
    return finite


@njit(**OPTIONS)
def fine(inputs, start, stop, buckets, used, tables):  # type: ignore[no-untyped-def]
    """kernels.fine over [start, stop); False if a number is not finite."""
    finite = True
    size = min(TILE, stop - start)
    values, base = np.empty((inputs.addresses.size, size), np.float32), np.empty(size, np.float32)
    for first in range(start, stop, TILE):
        if stop - first < size:
            size = stop - first
            values, base = np.empty((inputs.addresses.size, size), np.float32), np.empty(size, np.float32)
        finite &= _tile(inputs, first, values, base)
        kernels.fine(values.view(np.uint32), buckets, used, tables)
    return finite
