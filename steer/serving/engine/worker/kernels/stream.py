"""The change of the residual stream as one Triton kernel, for GPUs: one read and one write of the stream.

The reference is `blocks.change_of`. Compiled from it, the change reads the stream twice, for the components along the
directions and for the sum, and every direction of the table. Here one program handles one token, whose row stays in
registers; a token in slot 0 is copied, and a direction whose factors are zero is not read.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from steer.serving.engine.bounds import LONGEST
from steer.serving.engine.worker.kernels.launching import for_row, with_rows
from steer.serving.engine.worker.operators import define


def steered(
    half: Tensor, other: Tensor | None, slots: Tensor, added: Tensor, units: Tensor, factors: Tensor, limit: float
) -> Tensor:
    """`half` plus the change of the residual stream, which is `half`, or `half + other`; [tokens, hidden] each.

    `slots` [at least tokens], int32; `added` [slots, hidden], `units` [K, slots, hidden], `factors` [K, slots, 2],
    float32 on the same GPU. With a `limit`, the change brings no value of the stream beyond it; 0 for none.
    """
    half, other = with_rows(half), None if other is None else with_rows(other)
    result = torch.empty_like(half, memory_format=torch.contiguous_format)
    tokens, hidden = half.shape
    if tokens == 0:
        return result
    _kernel()[(tokens,)](
        half,
        half if other is None else other,
        result,
        slots,
        added,
        units,
        factors,
        hidden,
        added.shape[0],
        half.stride(0),
        half.stride(0) if other is None else other.stride(0),
        float(limit),
        LONGEST=float(LONGEST),
        DIRECTIONS=units.shape[0],
        SUM=other is not None,
        LIMITED=limit > 0,
        **for_row(hidden),
    )
    return result


@functools.cache
def _kernel() -> Any:
    """The kernel, compiled at its first launch; Triton is imported only here, for a CPU needs none."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(  # type: ignore[no-untyped-def]
        half,
        other,
        result,
        slots,
        added,
        units,
        factors,
        hidden,
        rows,
        half_stride,
        other_stride,
        limit,
        LONGEST: tl.constexpr,
        DIRECTIONS: tl.constexpr,
        SUM: tl.constexpr,
        LIMITED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        slot = tl.load(slots + token).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < hidden
        first = tl.load(half + token * half_stride + columns, mask=inside, other=0.0)
        if slot == 0:
            tl.store(result + token * hidden + columns, first, mask=inside)
        else:
            stream = first.to(tl.float32)
            if SUM:
                second = tl.load(other + token * other_stride + columns, mask=inside, other=0.0)
                stream = (stream + second.to(tl.float32)).to(first.dtype).to(tl.float32)  # as the model adds them
            change = tl.load(added + slot * hidden + columns, mask=inside, other=0.0)
            for k in tl.static_range(DIRECTIONS):
                row = k * rows + slot
                level = tl.load(factors + row * 2)
                gain = tl.load(factors + row * 2 + 1)
                # A masked load rather than a branch, so that the loads of all directions are under way together.
                width = tl.where(tl.abs(level) + tl.abs(gain) > 0.0, hidden, 0)
                unit = tl.load(units + row * hidden + columns, mask=columns < width, other=0.0)
                change += (level + gain * tl.sum(stream * unit, axis=0)) * unit
            if LIMITED:
                change = tl.maximum(change, tl.minimum(-limit - stream, 0.0), propagate_nan=tl.PropagateNan.ALL)
                change = tl.minimum(change, tl.maximum(limit - stream, 0.0), propagate_nan=tl.PropagateNan.ALL)
            else:
                change = tl.clamp(change, -LONGEST, LONGEST, propagate_nan=tl.PropagateNan.ALL)
            tl.store(result + token * hidden + columns, (first.to(tl.float32) + change).to(first.dtype), mask=inside)

    return kernel


define(
    "steered(Tensor half, Tensor? other, Tensor slots, Tensor added, Tensor units, Tensor factors, float limit)"
    " -> Tensor",
    cuda=steered,
    cpu=None,
    shape=lambda half, *_: torch.empty_like(half, memory_format=torch.contiguous_format),
)
