"""Readers of the elements of one tensor: from a mapped file, low-rank factors, a sparse list, an array, chosen rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from numba import njit

from merges.engine.floats import OPTIONS, decode
from vectors.weights import FLOATS, Entry, mapped


class Reader(Protocol):
    """A source of the elements of one tensor, read in pieces."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        ...

    def read(self, start: int, stop: int, out: np.ndarray) -> bool:
        """Fill `out` (float32) with the elements [start, stop) in row-major order; False if any is not finite."""
        ...


class Dense:
    """A tensor of a safetensors file, mapped on first use."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.shape = entry.shape

    @cached_property
    def raw(self) -> np.ndarray:
        """The bits of all elements, flat, in the dtype of `floats.storage`."""
        return mapped(self.entry)

    @property
    def address(self) -> int:
        """The address of the first mapped byte."""
        return int(self.raw.ctypes.data)

    @property
    def compiled(self) -> bool:
        """Whether compiled loops may read it in place: not float64, nor elements at odd addresses (of some files)."""
        return self.entry.dtype in FLOATS and self.address % self.raw.itemsize == 0

    def read(self, start: int, stop: int, out: np.ndarray) -> bool:
        return decode(self.raw[start:stop], self.entry.dtype, out)


class Array:
    """A float32 array that is in memory already."""

    def __init__(self, values: np.ndarray) -> None:
        self.shape = values.shape
        self.flat = np.ascontiguousarray(values, np.float32).reshape(-1)

    def read(self, start: int, stop: int, out: np.ndarray) -> bool:
        return decode(self.flat[start:stop], "F32", out)


class Zero:
    """A tensor of zeros: the delta of a tensor that a task vector does not change."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def read(self, start: int, stop: int, out: np.ndarray) -> bool:
        out[:] = 0
        return True


@njit(**OPTIONS)
def _product(up, down, scale, first_row, first_column, out):  # type: ignore[no-untyped-def]
    """out = scale * (up @ down), from `first_column` of row `first_row` on, summed in the order of the ranks."""
    columns = down.shape[1]
    row, column = first_row, first_column
    filled = 0
    while filled < out.size:
        width = min(columns - column, out.size - filled)
        for i in range(width):
            out[filled + i] = np.float32(0)
        for k in range(up.shape[1]):
            factor = up[row, k] * scale
            for i in range(width):
                out[filled + i] += factor * down[k, column + i]
        filled += width
        row, column = row + 1, 0


class LowRank:
    """scale * up @ down, with `up` [rows, rank] and `down` [rank, columns]: a LoRA adapter, never multiplied out.

    `shape` is that of the tensor where it is no matrix, such as the kernel of a convolution.
    """

    def __init__(
        self,
        up: np.ndarray,
        down: np.ndarray,
        scale: float = 1.0,
        transpose: bool = False,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        if transpose:
            up, down = down.T, up.T
        self.up, self.down = np.ascontiguousarray(up, np.float32), np.ascontiguousarray(down, np.float32)
        self.scale = np.float32(scale)
        self.shape: tuple[int, ...] = shape or (self.up.shape[0], self.down.shape[1])

    def read(self, start: int, stop: int, out: np.ndarray) -> bool:
        if stop <= start:
            return True
        row, column = divmod(start, self.down.shape[1])
        _product(self.up, self.down, self.scale, row, column, out)
        return bool(np.isfinite(out).all())


class Sparse:
    """Values at ascending positions of the flattened tensor, zero elsewhere."""

    def __init__(self, shape: tuple[int, ...], positions: np.ndarray, values: np.ndarray) -> None:
        self.shape, self.positions, self.values = shape, positions, values

    def read(self, start: int, stop: int, out: np.ndarray) -> bool:
        low, high = np.searchsorted(self.positions, (start, stop))
        out[:] = 0
        out[self.positions[low:high] - start] = self.values[low:high]
        return bool(np.isfinite(self.values[low:high]).all())


class Rows:
    """Rows of other readers, for vocabularies: row i is row `rows[i]` of `readers[indices[i]]`; zeros for index -1."""

    def __init__(self, readers: Sequence[Reader], indices: np.ndarray, rows: np.ndarray) -> None:
        self.readers, self.indices, self.rows = readers, indices, rows
        self.shape: tuple[int, ...] = (len(rows), *readers[0].shape[1:])

    def read(self, start: int, stop: int, out: np.ndarray) -> bool:
        width = math.prod(self.shape[1:])
        finite, position = True, start
        while position < stop:
            row, column = divmod(position, width)
            # Rows that are consecutive in the source too are read at once.
            last = row
            while (last + 1) * width < stop and self._is_consecutive(last):
                last += 1
            end = min((last + 1) * width, stop)
            part = out[position - start : end - start]
            if self.indices[row] < 0:
                part[:] = 0
            else:
                begin = int(self.rows[row]) * width + column
                finite &= self.readers[self.indices[row]].read(begin, begin + end - position, part)
            position = end
        return finite

    def _is_consecutive(self, row: int) -> bool:
        """Whether the next row is the next one of the same reader."""
        return (
            self.indices[row] >= 0
            and self.indices[row + 1] == self.indices[row]
            and self.rows[row + 1] == self.rows[row] + 1
        )


class Mean:
    """The mean of the rows of another reader, as one row."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.shape: tuple[int, ...] = (1, *reader.shape[1:])

    @cached_property
    def values(self) -> np.ndarray:
        """The means, computed on first use."""
        rows, width = self.reader.shape[0], math.prod(self.shape)
        step = max((1 << 16) // width, 1)
        total = np.zeros(width)
        for first in range(0, rows, step):
            part = np.empty(min(step, rows - first) * width, np.float32)
            self.reader.read(first * width, first * width + part.size, part)
            total += part.reshape(-1, width).sum(0, dtype=np.float64)
        return (total / rows).astype(np.float32)

    def read(self, start: int, stop: int, out: np.ndarray) -> bool:
        out[:] = self.values[start:stop]
        return bool(np.isfinite(out).all())


class Sum:
    """The sum of readers, in float32 and in their order: a model with an adapter."""

    def __init__(self, *readers: Reader) -> None:
        self.readers = readers
        self.shape = readers[0].shape

    def read(self, start: int, stop: int, out: np.ndarray) -> bool:
        finite = self.readers[0].read(start, stop, out)
        part = np.empty_like(out)
        for reader in self.readers[1:]:
            finite &= reader.read(start, stop, part)
            out += part
        return finite


def read_whole(reader: Reader) -> np.ndarray:
    """The whole tensor as float32, in its shape."""
    out = np.empty(math.prod(reader.shape), np.float32)
    reader.read(0, out.size, out)
    return out.reshape(reader.shape)
