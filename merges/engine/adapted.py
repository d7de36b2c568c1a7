"""Readers of weights that an adapter changes by other means than adding a delta."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from merges.engine.readers import Reader

PIECE = 1 << 18  # elements that are read at a time where a whole tensor is passed over


class Stack:
    """Tensors of one shape behind each other along a new first axis: the experts of a layer."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = readers
        self.shape: tuple[int, ...] = (len(readers), *readers[0].shape)

    def read(self, start: int, stop: int, out: np.ndarray) -> bool:
        """As `Reader.read`."""
        size = math.prod(self.shape[1:])
        finite, at = True, start
        while at < stop:
            which, offset = divmod(at, size)
            end = min((which + 1) * size, stop)
            finite &= self.readers[which].read(offset, offset + end - at, out[at - start : end - start])
            at = end
        return finite


class Slice:
    """The rows [first, first + shape[0]) of another reader's tensor."""

    def __init__(self, reader: Reader, first: int, shape: tuple[int, ...]) -> None:
        self.reader, self.shape = reader, shape
        self.offset = first * math.prod(shape[1:])

    def read(self, start: int, stop: int, out: np.ndarray) -> bool:
        """As `Reader.read`."""
        return self.reader.read(self.offset + start, self.offset + stop, out)


class Scaled:
    """A matrix (or a vector, with axis 0) times one factor for each index of `axis`."""

    def __init__(self, reader: Reader, factors: np.ndarray, axis: int) -> None:
        self.reader, self.axis, self.shape = reader, axis, reader.shape
        self._factors = np.ascontiguousarray(factors, np.float32).reshape(-1)

    @property
    def factors(self) -> np.ndarray:
        """The factor of each index of `axis`, [shape[axis]] float32."""
        return self._factors

    def read(self, start: int, stop: int, out: np.ndarray) -> bool:
        """As `Reader.read`."""
        self.reader.read(start, stop, out)
        if self.axis == 0:
            out *= self.factors[np.arange(start, stop) // math.prod(self.shape[1:])]
        else:
            out *= self.factors[np.arange(start, stop) % self.shape[-1]]
        return bool(np.isfinite(out).all())


class Magnitude(Scaled):
    """DoRA: a matrix whose vectors along the other axis have given lengths (Liu et al. 2024, arXiv:2402.09353).

    With `axis` 0 each row is scaled to its length in `lengths`, with 1 each column. The norms are summed in float64 in
    one pass over the matrix, when it is first read.
    """

    def __init__(self, reader: Reader, lengths: np.ndarray, axis: int) -> None:
        super().__init__(reader, lengths, axis)
        self.lock = threading.Lock()

    @property
    def factors(self) -> np.ndarray:
        """The length of each row or column divided by its norm, [shape[axis]] float32; computed on first use."""
        with self.lock:
            return self._ratios

    @cached_property
    def _ratios(self) -> np.ndarray:
        rows, columns = self.shape
        squares = np.zeros(self.shape[self.axis])
        step = max(PIECE // max(columns, 1), 1)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            part = np.empty((last - first) * columns, np.float32)
            self.reader.read(first * columns, last * columns, part)
            square = np.square(part.reshape(-1, columns), dtype=np.float64)
            if self.axis == 0:
                squares[first:last] = square.sum(1)
            else:
                squares += square.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self._factors / np.sqrt(squares)).astype(np.float32)
