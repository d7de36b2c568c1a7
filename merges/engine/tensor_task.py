"""The interface of a method to its data: one tensor of the result, its inputs in pieces, and statistics over them.

A method never holds more than a piece. `prepare(task)` may read the whole tensor through `map`, `sum` and
`gram`, which stream; `combine(task, block, prepared)` computes the elements of one piece.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np

from merges.engine import fused, kernels
from merges.engine.fused import AS_IS, KINDS, MINUS_BASE, PLUS_BASE, Elementwise, MappedInputs
from merges.engine.pool import Pool
from merges.engine.readers import Dense, Reader
from vectors.errors import ArtifactError

T = TypeVar("T")
CHUNK = 1 << 16  # elements at a time: those of four inputs fit into a core's cache
GROUP = 1 << 20  # elements that one worker takes at a time
Space = Literal["delta", "weight", "either"]
Unit = Literal["element", "row", "tensor"]


class Block(NamedTuple):
    """A piece of a tensor: the elements [start, start + count) of it, flattened.

    `values` [inputs, count] float32 are deltas in a method whose space is "delta", weights otherwise. The
    method may change them. `base` is [count] float32, or None. `out` [count] float64 is a buffer that may be used for
    the result; `pool.buffer` provides more.
    """

    values: np.ndarray
    base: np.ndarray | None
    out: np.ndarray
    start: int
    pool: Pool

    def apply(self, formula: Elementwise) -> np.ndarray:
        """The result of an elementwise formula, [count] float64, in `out`."""
        fused.apply(formula, self.values, self.start, self.out)
        return self.out


class Input(NamedTuple):
    """One input of a merge, at one tensor."""

    name: str  # for messages
    reader: Reader
    is_delta: bool  # whether the reader gives a delta, not weights
    key: int = 0  # the key of its random numbers


@dataclass(frozen=True, kw_only=True)
class Computation:
    """What is computed for a tensor. A merge method adds a name and options (see method.py).

    `space` is what `Block.values` holds: deltas against the base ("delta", and the result is a delta), weights
    ("weight"), or deltas where there is a base ("either"). `unit` is what pieces must not cut, and may depend on the
    options. `prepare(task)` may read the whole tensor; its result is passed to the others as `prepared`.
    `combine(task, block, prepared)` returns the elements of one piece, [count] float64. `elementwise(task, prepared)`
    returns instead a formula for every element, run in one compiled pass, or None if `combine` is to be called.
    """

    space: Space
    unit: Unit | Callable[[Mapping[str, Any]], Unit] = "element"
    prepare: Callable[[TensorTask], Any] | None = None
    combine: Callable[[TensorTask, Block, Any], np.ndarray] | None = None
    elementwise: Callable[[TensorTask, Any], Elementwise | None] | None = None


@dataclass(eq=False)
class TensorTask:
    """One tensor of the result. `each` are the options of each input, [inputs] float64; `options` are all others."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # of the result, as safetensors writes it
    inputs: tuple[Input, ...]
    base: Reader | None
    method: Computation
    pool: Pool
    each: Mapping[str, np.ndarray] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, tuple[Reader, ...]] = field(default_factory=dict)  # a reader for each input, by name
    as_delta: bool = False  # the result is a task vector
    scope: Sequence[TensorTask] = ()  # with `scope: global`, all tensors of the model
    shared: dict[str, Any] = field(default_factory=dict)  # state shared by all tensors of a scope
    patch: tuple[np.ndarray, np.ndarray] | None = None  # ascending positions, and the bits to put there

    @cached_property
    def count(self) -> int:
        """The number of elements of the tensor."""
        return math.prod(self.shape)

    @property
    def lock(self) -> threading.Lock:
        """Held while something is computed for all tensors of the scope."""
        return self.shared.setdefault("lock", threading.Lock())

    @property
    def row(self) -> int:
        """The number of elements in a row: the last dimension; a tensor of one dimension is one row."""
        return self.shape[-1] if len(self.shape) > 1 else max(self.count, 1)

    @cached_property
    def in_deltas(self) -> bool:
        """Whether the method works on deltas; "either" does where there is a base."""
        return self.method.space == "delta" or (self.method.space == "either" and self.base is not None)

    @property
    def unit(self) -> Unit:
        """The unit that pieces must not cut: "element", "row" or "tensor"."""
        unit = self.method.unit
        return unit(self.options) if callable(unit) else unit

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """The pieces of [start, stop), which depend only on the shape and the method."""
        stop = self.count if stop is None else stop
        size = self.step(CHUNK)
        for begin in range(start, stop, size):
            yield begin, min(begin + size, stop)

    def step(self, wanted: int) -> int:
        """About `wanted` elements, without cutting a unit."""
        if self.unit == "tensor":
            return max(self.count, 1)
        return max(wanted // self.row, 1) * self.row if self.unit == "row" else wanted

    def groups(self) -> Iterator[tuple[int, int]]:
        """The pieces for one worker each, which are whole chunks."""
        size = self.step(CHUNK)
        size *= max(GROUP // size, 1)
        for begin in range(0, self.count, size):
            yield begin, min(begin + size, self.count)

    @cached_property
    def mapped_inputs(self) -> MappedInputs | None:
        """The addresses of all inputs, for the compiled loops; None unless all are plain tensors of mapped files."""
        readers = [source.reader for source in self.inputs]
        needs_base = self.base is not None and (
            self.in_deltas != self.as_delta or any(self.in_deltas != source.is_delta for source in self.inputs)
        )
        base = self.base if needs_base else None
        if not all(isinstance(reader, Dense) and reader.compiled for reader in [*readers, *([base] if base else [])]):
            return None
        dense = cast(list[Dense], readers)
        role = MINUS_BASE if self.in_deltas else PLUS_BASE
        roles = [role if base is not None and source.is_delta != self.in_deltas else AS_IS for source in self.inputs]
        dense_base = cast(Dense, base)
        return MappedInputs(
            np.array([reader.address for reader in dense], np.uint64),
            np.array([KINDS[reader.entry.dtype] for reader in dense], np.int64),
            np.array(roles, np.int64),
            np.uint64(dense_base.address if base else 0),
            KINDS[dense_base.entry.dtype] if base else 0,
        )

    def block(self, start: int, stop: int) -> Block:
        """Read one piece. Raises ArtifactError for a value that is not finite, naming tensor and input."""
        buffer, count = self.pool.buffer, stop - start
        values = buffer("values", (len(self.inputs), count), np.float32)
        out = buffer("out", (count,), np.float64)
        base = None
        if self.base is not None:
            base = buffer("base", (count,), np.float32)
            self._read("the base", self.base, start, stop, base)
        for row, source in zip(values, self.inputs, strict=True):
            self._read(source.name, source.reader, start, stop, row)
            if not self.in_deltas and source.is_delta and base is not None:
                row += base
        if self.in_deltas and base is not None:
            plain = [not source.is_delta for source in self.inputs]
            if all(plain):
                kernels.subtract(values, base)
            else:
                for m in np.flatnonzero(plain):
                    kernels.subtract(values[m : m + 1], base)
        return Block(values, base, out, start, self.pool)

    def _read(self, name: str, reader: Reader, start: int, stop: int, out: np.ndarray) -> None:
        if not reader.read(start, stop, out):
            position = start + int(np.flatnonzero(~np.isfinite(out))[0])
            raise ArtifactError(
                f"{name} holds a value that is not finite in {self.name}, at element {position}",
                "repair that model, or leave it out of the merge",
            )

    def statistic(self, name: str, block: Block) -> np.ndarray:
        """A statistic of the inputs, such as `fisher`, for this piece: [inputs, count] float32."""
        out = np.empty(block.values.shape, np.float32)
        for row, reader in zip(out, self.statistics[name], strict=True):
            self._read(f"{name} of an input", reader, block.start, block.start + row.size, row)
        return out

    def map(self, function: Callable[[Block], T]) -> list[T]:
        """function(block) of every piece, in order, computed on all cores."""

        def group(start: int, stop: int) -> list[T]:
            return [function(self.block(*chunk)) for chunk in self.chunks(start, stop)]

        return [result for part in self.pool.map(group, self.groups()) for result in part]

    def sum(self, function: Callable[[Block], Any]) -> Any:
        """The sum of function(block) over the pieces, in order, so that it does not depend on threads."""
        parts = self.map(function)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def gram(self, *, with_base: bool = False) -> np.ndarray:
        """The inner products of the inputs, and with `with_base` the base, [inputs, inputs] float64."""

        def part(block: Block) -> np.ndarray:
            values = block.values
            if with_base:
                assert block.base is not None
                values = np.concatenate([values, block.base[None]])
            out = np.empty((len(values), len(values)))
            kernels.gram(values, out)
            return out

        return self.sum(part)
