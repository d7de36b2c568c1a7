"""The fused pass itself: from the bits of mapped files to the bits of the result, tile by tile, in one compiled call.

An `Elementwise` says what is done to each element; `apply` does it to values that are in memory already, and `merge` to
what lies on disk as it is. Both run the same loops on every element, so they give the same bits.

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


class Elementwise(NamedTuple):
    """A formula for each element: scale * the weighted sum of factor * value, after trimming and dropping.

    With `votes` a sign is elected first, and only what agrees with it is summed, or averaged if `mean`. All arrays are
    [inputs], float64 where nothing else is said.
    """

    weights: np.ndarray
    factors: np.ndarray | None = None  # what is left of each input is multiplied by
    votes: np.ndarray | None = None  # what each input's values weigh in the election
    low: np.ndarray | None = None  # float32: the least magnitude that stays
    high: np.ndarray | None = None  # float32: the greatest magnitude that stays
    keys: np.ndarray | None = None  # uint64: where the random numbers of a random drop come from
    keep: np.ndarray | None = None  # the chance of staying in a random drop
    mean: bool = False  # the weighted mean of what agrees, not its sum
    positive: bool = False  # + is elected where the votes cancel, not nothing
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


class Filled(NamedTuple):
    """An Elementwise without None, so that the loops are compiled for one set of types: empty arrays say nothing."""

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
    """Where the inputs of a tensor lie in mapped files. All arrays are [inputs]."""

    addresses: np.ndarray  # uint64
    kinds: np.ndarray  # int64: of their numbers, as in KINDS
    roles: np.ndarray  # int64: what the base does to each, ALONE, LESS or MORE
    base: Any  # its address, a NumPy uint64; 0: there is none, or nothing needs it
    base_kind: int


def apply(formula: Elementwise, values: np.ndarray, start: int, out: np.ndarray) -> None:
    """Fill `out` [count] float64 from `values` [inputs, count] float32, which it changes; they begin at `start`."""
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
    """The same for a whole tile of a few inputs."""
    _drop(values, formula, start)
    rows = values.reshape(-1)
    if formula.votes.size:
        kernels.elect_few(rows, unrolled[0], unrolled[1], unrolled[2], formula.mean, formula.positive, out)
    else:
        kernels.weighted_sum_few(rows, unrolled[0], out)
    _scale(out, formula.scale)


@njit(**OPTIONS)
def _drop(values, formula, start):  # type: ignore[no-untyped-def]
    """Zero what is trimmed and what is dropped at random, in place."""
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
def _tile(inputs, start, values, below):  # type: ignore[no-untyped-def]
    """Read one tile of all inputs and the base; False if a number is not finite."""
    finite = True
    addresses, kinds, roles = inputs.addresses, inputs.kinds, inputs.roles
    if inputs.base:
        finite &= _load(inputs.base, inputs.base_kind, start, below)
    for m in range(addresses.size):
        row = values[m]
        if kinds[m] == 0 and roles[m] == LESS:
            raw = carray(_pointer(addresses[m] + np.uint64(2 * start)), (row.size,), np.uint16)
            finite &= subtract_bfloat16(raw, below, row)
            continue
        finite &= _load(addresses[m], kinds[m], start, row)
        if roles[m] == LESS:
            for i in range(row.size):
                row[i] -= below[i]
        elif roles[m] == MORE:
            for i in range(row.size):
                row[i] += below[i]
    return finite


@njit(**OPTIONS)
def merge(inputs, formula, unrolled, add, start, bfloat16, float32):  # type: ignore[no-untyped-def]
    """Fill `bfloat16` (uint16, the bits) or `float32`, of which the other is empty, with elements from `start` on.

    `inputs` is a MappedInputs, `formula` a Filled, `unrolled` what Elementwise.unrolled gives. `add` is 1 where the
    base is added to what comes out, -1 where it is taken from it. Answers False where a number is not finite or out of
    range, without saying which.
    """
    count = bfloat16.size + float32.size
    size = min(TILE, count)
    values, below, out = np.empty((inputs.addresses.size, size), np.float32), np.empty(size, np.float32), np.empty(size)
    good = True
    for first in range(0, count, TILE):
        if count - first < size:
            size = count - first
            values, below, out = (
                np.empty((inputs.addresses.size, size), np.float32),
                np.empty(size, np.float32),
                np.empty(size),
            )
        good &= _tile(inputs, start + first, values, below)
        if unrolled is None or size < TILE:
            _apply(values, formula, start + first, out)
        else:
            _apply_few(values, formula, unrolled, start + first, out)
        if add > 0:
            kernels.add(out, below)
        elif add < 0:
            for i in range(size):
                out[i] -= below[i]
        if bfloat16.size:
            good &= encode_bfloat16(out, bfloat16[first : first + size])
        else:
            target = float32[first : first + size]
            good &= encode_float32(out, target.view(np.uint32), target)
    return good


# The three passes below repeat one loop over tiles: written once as a generator it was 10 to 20 % slower (Numba keeps a
# generator's state in memory), and a function that is handed over as an argument is compiled anew in every process.


@njit(**OPTIONS)
def sample(inputs, starts, size, out):  # type: ignore[no-untyped-def]
    """The values of `size` elements from each of `starts` on, finite or not: out is [inputs, starts * size]."""
    values, below = np.empty((inputs.addresses.size, size), np.float32), np.empty(size, np.float32)
    for j in range(starts.size):
        _tile(inputs, starts[j], values, below)
        out[:, j * size : (j + 1) * size] = values


@njit(**OPTIONS)
def split(inputs, start, stop, lows, highs, counts, within):  # type: ignore[no-untyped-def]
    """kernels.split over [start, stop); False if a number is not finite or there is no room for what lies within."""
    size = min(TILE, stop - start)
    values, below = np.empty((inputs.addresses.size, size), np.float32), np.empty(size, np.float32)
    flags, marked = np.zeros((size + 7) // 8 * 8, np.uint8), np.empty((size + 7) // 8 + 1, np.int64)
    for first in range(start, stop, TILE):
        if stop - first < size:
            size = stop - first
            values, below = np.empty((inputs.addresses.size, size), np.float32), np.empty(size, np.float32)
            flags = np.zeros((size + 7) // 8 * 8, np.uint8)
        if not _tile(inputs, first, values, below):
            return False
        if not kernels.split(values, lows, highs, flags, marked, counts, within):
            return False
    return True


@njit(**OPTIONS)
def coarse(inputs, start, stop, tables):  # type: ignore[no-untyped-def]
    """kernels.coarse over [start, stop); False if a number is not finite."""
    good = True
    size = min(TILE, stop - start)
    values, below = np.empty((inputs.addresses.size, size), np.float32), np.empty(size, np.float32)
    for first in range(start, stop, TILE):
        if stop - first < size:
            size = stop - first
            values, below = np.empty((inputs.addresses.size, size), np.float32), np.empty(size, np.float32)
        good &= _tile(inputs, first, values, below)
        kernels.coarse(values.view(np.uint32), tables)
    return good


@njit(**OPTIONS)
def fine(inputs, start, stop, buckets, used, tables):  # type: ignore[no-untyped-def]
    """kernels.fine over [start, stop); False if a number is not finite."""
    good = True
    size = min(TILE, stop - start)
    values, below = np.empty((inputs.addresses.size, size), np.float32), np.empty(size, np.float32)
    for first in range(start, stop, TILE):
        if stop - first < size:
            size = stop - first
            values, below = np.empty((inputs.addresses.size, size), np.float32), np.empty(size, np.float32)
        good &= _tile(inputs, first, values, below)
        kernels.fine(values.view(np.uint32), buckets, used, tables)
    return good
