"""The fused pass in torch, for a GPU: what fused.py and kernels.py do, operation for operation, so with the same bits.

The operations on elements are in steps.py; this file moves pieces to the device and back, and counts magnitudes.

Every line is a separate GPU kernel, so nothing is contracted or reassociated; float64 sums, products and quotients are
rounded as on a CPU. The threads of the pool copy mapped files through pinned memory, a piece at a time. A test compares
the bits, in torch on the CPU and, where there is one, on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch

from merges.engine import steps
from merges.engine.fused import MINUS_BASE, PLUS_BASE, Elementwise
from merges.engine.readers import Dense, Reader
from merges.engine.tensor_task import TensorTask
from vectors.errors import UsageError

KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
Count = Callable[[torch.Tensor, int], torch.Tensor]  # from the bits of magnitudes, and the number of their row


def find(device: str) -> torch.device:
    """The device of that name. Raises UsageError for a device that is not available or not supported."""
    hint = "use --device cpu, cuda or cuda:N"
    if device.partition(":")[0] != "cuda":
        raise UsageError(f"merging does not run on the device {device!r}", hint)
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the device {device!r} is not available: {str(error).splitlines()[0]}", hint) from None
    return chosen


def merge(
    job: TensorTask, formula: Elementwise, add: int, start: int, stop: int, device: torch.device
) -> np.ndarray | None:
    """The bits of the elements [start, stop), as fused.merge gives them: uint16 for bfloat16, or float32.

    `add` is 1 to add the base to the result, -1 to subtract it, 0 for neither. Returns None if a number is not finite
    (the CPU loops then report it), or if the device is out of memory.
    """
    try:
        return _merged(job, formula, add, start, stop, device)
    except torch.OutOfMemoryError:
        return None


def _merged(
    job: TensorTask, formula: Elementwise, add: int, start: int, stop: int, device: torch.device
) -> np.ndarray | None:
    rows, base, finite = _rows(job, start, stop, device)
    weights = formula.weights.tolist()
    factors = [1.0] * len(weights) if formula.factors is None else formula.factors.tolist()
    if formula.low is not None and formula.high is not None:
        for m, (low, high) in enumerate(zip(formula.low.tolist(), formula.high.tolist(), strict=True)):
            rows[m] = steps.trim(rows[m], low, high)
    if formula.keys is not None and formula.keep is not None:
        index = torch.arange(start, stop, device=device)
        for m, (key, keep) in enumerate(zip(formula.keys.tolist(), formula.keep.tolist(), strict=True)):
            rows[m] = steps.random_drop(rows[m], index, key, keep)
    if formula.votes is not None:
        for m, factor in enumerate(factors):
            rows[m] = steps.wide(rows[m]) * factor if factor != 1.0 else steps.wide(rows[m])
        signs = steps.elect_signs(rows, formula.votes.tolist(), positive=formula.positive)
        out = steps.disjoint_mean(rows, weights, signs, mean=formula.mean)
    else:
        out = steps.weighted_sum(rows, [weight * factor for weight, factor in zip(weights, factors, strict=True)])
    if formula.scale != 1.0:
        out = out * formula.scale
    if add and base is not None:
        out = out + base.double() if add > 0 else out - base.double()
    bits, in_range = _bfloat16(out) if job.dtype == "BF16" else _float32(out)
    if not bool(finite & in_range):
        return None
    return bits.cpu().numpy().view(np.uint16 if job.dtype == "BF16" else np.float32)


def coarse(tensors: Sequence[TensorTask], device: torch.device) -> np.ndarray | None:
    """Counts of each row's magnitudes by the upper 15 of their 31 bits, [rows, 32768] int64; None as for `merge`."""

    def count(bits: torch.Tensor, row: int) -> torch.Tensor:
        return torch.bincount(bits >> 16, minlength=1 << 15)

    return _counted(tensors, count, device)


def fine(tensors: Sequence[TensorTask], buckets: Sequence[np.ndarray], device: torch.device) -> np.ndarray | None:
    """Counts of the magnitudes in each row's buckets by their lower 16 bits, [rows, most buckets, 65536] int64.

    `buckets[row]` are the upper 15 bits of the magnitudes to count. None as for `merge`.
    """
    most = max(len(row) for row in buckets)

    def count(bits: torch.Tensor, row: int) -> torch.Tensor:
        tables = torch.zeros((most, 1 << 16), dtype=torch.int64, device=device)
        for number, bucket in enumerate(buckets[row].tolist()):
            tables[number] = torch.bincount(bits[bits >> 16 == bucket] & 0xFFFF, minlength=1 << 16)
        return tables

    return _counted(tensors, count, device)


def _counted(tensors: Sequence[TensorTask], count: Count, device: torch.device) -> np.ndarray | None:
    """The sum of `count` over all pieces, [rows, ...]; each thread has its own table."""
    pool = tensors[0].pool
    tables: dict[int, torch.Tensor] = {}

    def group(tensor: TensorTask, start: int, stop: int) -> bool:
        try:
            values, _, finite = _rows(tensor, start, stop, device)
            counted = torch.stack([count(row.view(torch.int32) & 0x7FFFFFFF, m) for m, row in enumerate(values)])
        except torch.OutOfMemoryError:
            return False
        thread = threading.get_ident()
        tables[thread] = tables[thread] + counted if thread in tables else counted
        return bool(finite)

    if not all(pool.map(group, ((tensor, *piece) for tensor in tensors for piece in tensor.groups()))):
        return None
    return np.sum([table.cpu().numpy() for table in tables.values()], axis=0)


def _rows(
    job: TensorTask, start: int, stop: int, device: torch.device
) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor]:
    """As fused._tile: the inputs (minus or plus the base by their role), the base, and whether all are finite."""
    assert job.mapped_inputs is not None
    base = _load(cast(Reader, job.base), start, stop, device) if job.mapped_inputs.base else None
    finite = torch.tensor(True, device=device) if base is None else base.isfinite().all()
    values = []
    for source, role in zip(job.inputs, job.mapped_inputs.roles.tolist(), strict=True):
        row = _load(source.reader, start, stop, device)
        finite = finite & row.isfinite().all()
        if base is not None and role in (MINUS_BASE, PLUS_BASE):
            row = row - base if role == MINUS_BASE else row + base
        values.append(row)
    return values, base, finite


def _load(reader: Reader, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """A piece of a mapped tensor as float32 on the device."""
    dense = cast(Dense, reader)
    raw = dense.raw[start:stop]
    host = torch.empty(raw.size, dtype=KINDS[dense.entry.dtype], pin_memory=device.type == "cuda")
    np.copyto(host.view(torch.uint8).numpy(), raw.view(np.uint8))
    return host.to(device, non_blocking=True).float()


def _bfloat16(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """floats.encode_bfloat16: the bits, int16, and whether all are finite."""
    single = out.float()
    wide = single.double()
    inexact = (wide != out).int()
    odd = (single.view(torch.int32) - (inexact & (wide.abs() > out.abs()).int())) | inexact
    rounded = ((odd + 0x7FFF + ((odd >> 16) & 1)) >> 16) & 0xFFFF
    # NaN is tested separately: rounding up may turn the bits of a NaN into those of -0.
    return rounded.to(torch.int16), ((rounded & 0x7FFF).max() < 0x7F80) & ~single.isnan().any()


def _float32(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    single = out.float()
    return single, single.isfinite().all()
