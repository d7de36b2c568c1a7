"""The fused pass in torch, for a GPU: what fused.py and kernels.py do, operation for operation, so with the same bits.

Every line is a kernel of its own, so nothing is contracted or reassociated; float64 sums, products and quotients are
rounded there as they are on a processor. What lies in mapped files is copied through pinned memory, a piece at a time,
by the threads of the pool. A test compares the bits, in torch on the CPU and, where there is one, on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch

from merges.engine.fused import LESS, MORE, Fusion
from merges.engine.readers import Dense, Reader
from merges.engine.tensor_task import TensorTask
from vectors.errors import UsageError

KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
Count = Callable[[torch.Tensor, int], torch.Tensor]  # from the bits of magnitudes, and the number of their row
GOLDEN = 0x9E3779B97F4A7C15
LOWER = 0xFFFFFFFF


def find(device: str) -> torch.device:
    """The device of that name. Raises UsageError for one that is not there, or on which merging does not run."""
    hint = "use --device cpu, cuda or cuda:N"
    if device.partition(":")[0] != "cuda":
        raise UsageError(f"merging does not run on the device {device!r}", hint)
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the device {device!r} is not available: {str(error).splitlines()[0]}", hint) from None
    return found


def merge(job: TensorTask, fusion: Fusion, add: int, start: int, stop: int, device: torch.device) -> np.ndarray | None:
    """The bits of the elements [start, stop), as fused.merge gives them.

    None where a number is not finite, which the loops name then, or where the device has no room.
    """
    try:
        return _merged(job, fusion, add, start, stop, device)
    except torch.OutOfMemoryError:
        return None


def _merged(
    job: TensorTask, fusion: Fusion, add: int, start: int, stop: int, device: torch.device
) -> np.ndarray | None:
    values, base, good = _rows(job, start, stop, device)
    weights = fusion.weights.tolist()
    factors = [1.0] * len(weights) if fusion.factors is None else fusion.factors.tolist()
    if fusion.low is not None and fusion.high is not None:
        for m, (low, high) in enumerate(zip(fusion.low.tolist(), fusion.high.tolist(), strict=True)):
            magnitude = values[m].abs()
            values[m] = torch.where((magnitude >= low) & (magnitude <= high), values[m], 0)
    if fusion.keys is not None and fusion.keep is not None:
        for m, (key, keep) in enumerate(zip(fusion.keys.tolist(), fusion.keep.tolist(), strict=True)):
            values[m] = torch.where(_drawn(key, start, stop, device) < int(np.ceil(keep * 2.0**32)), values[m], 0)
    wide = [row.double() for row in values]
    if fusion.votes is not None:
        out = _elect(wide, factors, fusion.votes.tolist(), weights, fusion.mean, fusion.positive)
    else:
        out = wide[0] * (weights[0] * factors[0])
        for row, weight, factor in zip(wide[1:], weights[1:], factors[1:], strict=True):
            out = out + row * (weight * factor)
    if fusion.scale != 1.0:
        out = out * fusion.scale
    if add and base is not None:
        out = out + base.double() if add > 0 else out - base.double()
    bits, finite = _bfloat16(out) if job.dtype == "BF16" else _float32(out)
    if not bool(good & finite):
        return None
    return bits.cpu().numpy().view(np.uint16 if job.dtype == "BF16" else np.float32)


def _elect(
    rows: list[torch.Tensor], factors: list[float], votes: list[float], weights: list[float], mean: bool, positive: bool
) -> torch.Tensor:
    """kernels.elect."""
    sign = torch.zeros_like(rows[0])
    for row, factor, vote in zip(rows, factors, votes, strict=True):
        sign = sign + (row * factor) * vote
    if positive:
        sign = torch.where(sign < 0, -1.0, 1.0).double()
    total, mass = torch.zeros_like(sign), torch.zeros_like(sign)
    for row, factor, weight in zip(rows, factors, weights, strict=True):
        value = row * (factor * (float(weight > 0) - float(weight < 0)))
        share = (value * sign > 0).double() * abs(weight)
        total = total + share * value
        mass = mass + share
    return total / torch.where(mass > 0, mass, 1.0) if mean else total


def coarse(tensors: Sequence[TensorTask], device: torch.device) -> np.ndarray | None:
    """How many magnitudes of each row have these upper 15 of their 31 bits, [rows, 32768]; None as in `merge`."""

    def count(bits: torch.Tensor, row: int) -> torch.Tensor:
        return torch.bincount(bits >> 16, minlength=1 << 15)

    return _counted(tensors, count, device)


def fine(tensors: Sequence[TensorTask], buckets: Sequence[np.ndarray], device: torch.device) -> np.ndarray | None:
    """How many of each of a row's buckets have these lower 16 bits, [rows, most buckets, 65536]; None as in `merge`."""
    most = max(len(own) for own in buckets)

    def count(bits: torch.Tensor, row: int) -> torch.Tensor:
        tables = torch.zeros((most, 1 << 16), dtype=torch.int64, device=device)
        for place, bucket in enumerate(buckets[row].tolist()):
            tables[place] = torch.bincount(bits[bits >> 16 == bucket] & 0xFFFF, minlength=1 << 16)
        return tables

    return _counted(tensors, count, device)


def _counted(tensors: Sequence[TensorTask], count: Count, device: torch.device) -> np.ndarray | None:
    """The sum of `count` over all pieces, [rows, ...]; each thread adds up its own."""
    pool = tensors[0].pool
    tables: dict[int, torch.Tensor] = {}

    def group(tensor: TensorTask, start: int, stop: int) -> bool:
        try:
            values, _, good = _rows(tensor, start, stop, device)
            own = torch.stack([count(row.view(torch.int32) & 0x7FFFFFFF, m) for m, row in enumerate(values)])
        except torch.OutOfMemoryError:
            return False
        thread = threading.get_ident()
        tables[thread] = tables[thread] + own if thread in tables else own
        return bool(good)

    if not all(pool.map(group, ((tensor, *piece) for tensor in tensors for piece in tensor.groups()))):
        return None
    return np.sum([table.cpu().numpy() for table in tables.values()], axis=0)


def _rows(
    job: TensorTask, start: int, stop: int, device: torch.device
) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor]:
    """What fused._tile reads: the inputs, less or plus the base where that is their role, the base, are all finite."""
    assert job.direct is not None
    base = _load(cast(Reader, job.base), start, stop, device) if job.direct.base else None
    good = torch.tensor(True, device=device) if base is None else base.isfinite().all()
    values = []
    for source, role in zip(job.inputs, job.direct.roles.tolist(), strict=True):
        row = _load(source.reader, start, stop, device)
        good = good & row.isfinite().all()
        if base is not None and role in (LESS, MORE):
            row = row - base if role == LESS else row + base
        values.append(row)
    return values, base, good


def _load(reader: Reader, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """A piece of a mapped tensor as float32 on the device."""
    dense = cast(Dense, reader)
    raw = dense.raw[start:stop]
    host = torch.empty(raw.size, dtype=KINDS[dense.entry.dtype], pin_memory=device.type == "cuda")
    np.copyto(host.view(torch.uint8).numpy(), raw.view(np.uint8))
    return host.to(device, non_blocking=True).float()


def _drawn(key: int, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """The 32 random bits of each element, as kernels.drop draws them: [count] int64."""
    index = torch.arange(start, stop, device=device)
    x = (index // 2 + 1) * _signed(GOLDEN) + _signed(key)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shifted(x, 31)
    return torch.where(index % 2 == 0, x & LOWER, _shifted(x, 32))


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x >> bits of numbers without a sign, which torch has no shifts for."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _bfloat16(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """floats.encode_bfloat16: the bits, int16, and whether all are finite."""
    single = out.float()
    wide = single.double()
    inexact = (wide != out).int()
    odd = (single.view(torch.int32) - (inexact & (wide.abs() > out.abs()).int())) | inexact
    rounded = ((odd + 0x7FFF + ((odd >> 16) & 1)) >> 16) & 0xFFFF
    # A NaN is asked for by itself: rounding up may carry the bits of one beyond all others, to those of -0.
    return rounded.to(torch.int16), ((rounded & 0x7FFF).max() < 0x7F80) & ~single.isnan().any()


def _float32(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    single = out.float()
    return single, single.isfinite().all()
