"""Running jobs: read, decode, subtract, combine, round and yield, piece by piece, in order, on all cores.

Memory holds a piece of each input for each thread and a few finished pieces, whatever the size of the model.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from merges.engine import fused, kernels
from merges.engine.floats import encode, storage
from merges.engine.pool import Pool
from merges.engine.tensor_task import TensorTask
from vectors.errors import ArtifactError, ModelError
from vectors.weights import FLOATS, NAMES, Entry, mapped


class Copy(NamedTuple):
    """A tensor that is copied: not floating-point (and the same in every input), or changed by no input."""

    name: str
    entry: Entry
    others: tuple[Entry, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self.entry.shape

    @property
    def dtype(self) -> str:
        """The dtype, as safetensors writes it."""
        return self.entry.dtype


Job = TensorTask | Copy
AHEAD = 3  # tensors whose `prepare` runs at the same time
NOTHING = np.empty(0, np.float32)


class Piece(NamedTuple):
    """Consecutive elements of a tensor of the result, as bits of its dtype."""

    job: Job
    bits: np.ndarray


def run(jobs: Iterable[Job], pool: Pool) -> Iterator[Piece]:
    """The bits of every tensor, in order, in pieces. Raises ArtifactError, ModelError for invalid values."""

    def tasks() -> Iterator[Callable[[], Piece]]:
        # The next tensors are prepared meanwhile, since a single one would not keep all cores busy.
        with ThreadPoolExecutor(AHEAD, thread_name_prefix="merge-prepare") as preparing:
            coming: deque[tuple[Job, Future[Any]]] = deque()
            rest = iter(jobs)
            try:
                while True:
                    while len(coming) < AHEAD and (job := next(rest, None)) is not None:
                        coming.append((job, preparing.submit(_prepare, job)))
                    if not coming:
                        return
                    job, prepared = coming.popleft()
                    statistics = prepared.result()
                    if isinstance(job, Copy):
                        yield from (functools.partial(_copy, job, *piece) for piece in _spans(job))
                    else:
                        yield from (functools.partial(_compute, job, *piece, statistics) for piece in job.groups())
            finally:
                preparing.shutdown(wait=True, cancel_futures=True)

    yield from pool.stream(tasks)


def _prepare(job: Job) -> Any:
    if isinstance(job, Copy) or job.method.prepare is None or not job.count:
        return None
    return job.method.prepare(job)


def _compute(job: TensorTask, start: int, stop: int, prepared: Any) -> Piece:
    result = np.empty(stop - start, storage(job.dtype))
    method = job.method
    formula = method.elementwise(job, prepared) if method.elementwise is not None else None
    base_sign = 0 if job.base is None or job.in_deltas == job.as_delta else 1 if job.in_deltas else -1
    if formula is not None and job.mapped_inputs is not None and job.dtype != "F16":
        if job.pool.device is not None:
            from merges.engine import gpu

            on_device = gpu.merge(job, formula, base_sign, start, stop, job.pool.device)
            if on_device is not None:
                return Piece(job, _patched(job, start, on_device))
        bfloat16, float32 = (result, NOTHING) if job.dtype == "BF16" else (NOTHING.view(np.uint16), result)
        # If a number is not finite, the loop below finds and reports it.
        if fused.merge(job.mapped_inputs, formula.filled(), formula.unrolled(), base_sign, start, bfloat16, float32):
            return Piece(job, _patched(job, start, result))
    finite = True
    for begin, end in job.chunks(start, stop):
        block = job.block(begin, end)
        if formula is not None:
            merged = block.apply(formula)
        else:
            assert method.combine is not None, "a computation that runs has elementwise or combine"
            merged = method.combine(job, block, prepared)
        out = np.ascontiguousarray(merged, np.float64).reshape(-1)
        if base_sign > 0:
            kernels.add(out, block.base)
        elif block.base is not None and base_sign < 0:
            out = out - block.base
        finite &= encode(out, job.dtype, result[begin - start : end - start])
    if not finite:
        raise ArtifactError(
            f"the merge of {job.name} leaves the range of {NAMES[job.dtype]}",
            "use smaller weights or a smaller lambda, or --dtype float32",
        )
    return Piece(job, _patched(job, start, result))


def _patched(job: TensorTask, start: int, result: np.ndarray) -> np.ndarray:
    """The piece with the bits of `job.patch`, which base + delta would have rounded wrongly, put in."""
    if job.patch is not None:
        positions, bits = job.patch
        low, high = np.searchsorted(positions, (start, start + result.size))
        result[positions[low:high] - start] = bits[low:high]
    return result


def _spans(job: Copy) -> Iterator[tuple[int, int]]:
    for start in range(0, job.entry.elements, 1 << 20):
        yield start, min(start + (1 << 20), job.entry.elements)


def _copy(job: Copy, start: int, stop: int) -> Piece:
    piece = mapped(job.entry)[start:stop]
    for other in job.others:
        if not np.array_equal(mapped(other)[start:stop], piece):
            kind = "can't be merged, because it is not floating-point," if job.dtype not in FLOATS else "is not merged"
            raise ModelError(
                f"{job.name} {kind} and differs between {job.entry.file} and {other.file}",
                "merge models in which it is the same",
            )
    return Piece(job, piece)
