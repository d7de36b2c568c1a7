"""The gates of a layer as two Triton kernels, for GPUs; the reference is the tensor code of `gates`.

As tensor code a gate takes some twenty kernels a layer, each of which costs a GPU more to begin than to do. The first
kernel computes the scores, a program a token, and stores what is decided in the rows of the requests; the second, which
reads the rows, chooses the slots, a program for many tokens. Two, since the token that decides and the tokens that
follow its decision can be in one step.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from steer.serving.engine.worker.kernels.launching import for_row, with_rows

TOGETHER = 128  # tokens of a program of the second kernel


def gate(
    half: Tensor,
    other: Tensor | None,
    layer: int,
    weights: Tensor,
    limits: Tensor,
    modes: Tensor,
    ends: Tensor,
    choices: Tensor,
    tokens: Tensor,
    open_gates: Tensor,
    values: Tensor,
    counts: Tensor,
    slots: Tensor,
) -> None:
    """Read the stream, `half` or `half + other`, [tokens, hidden] each; the other tensors are those of GateTable."""
    count, hidden = half.shape
    if count == 0:
        return
    half, other = with_rows(half), None if other is None else with_rows(other)
    gates, rows = weights.shape[0], weights.shape[1]
    scores = torch.empty(gates, count, dtype=torch.float32, device=half.device)
    score, choose = _kernels()
    score[(count,)](
        half,
        half if other is None else other,
        layer,
        weights,
        limits,
        modes,
        tokens,
        values,
        scores,
        hidden,
        rows,
        values.shape[1],
        count,
        half.stride(0),
        half.stride(0) if other is None else other.stride(0),
        GATES=gates,
        SUM=other is not None,
        **for_row(hidden),
    )
    choose[(-(-count // TOGETHER),)](
        layer,
        limits,
        modes,
        ends,
        choices,
        tokens,
        open_gates,
        values,
        counts,
        slots,
        scores,
        rows,
        values.shape[1],
        counts.shape[1],
        count,
        GATES=gates,
        TOGETHER=TOGETHER,
    )


@functools.cache
def _kernels() -> tuple[Any, Any]:
    """Both kernels, compiled at their first launch; Triton is imported only here, for a CPU needs none."""
    import triton
    import triton.language as tl

    @triton.jit
    def score(  # type: ignore[no-untyped-def]
        half,
        other,
        layer,
        weights,
        limits,
        modes,
        tokens,
        values,
        scores,
        hidden,
        rows,
        value_rows,
        count,
        half_stride,
        other_stride,
        GATES: tl.constexpr,
        SUM: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        plan = tl.load(tokens + token * 4).to(tl.int64)
        if plan != 0:
            row = tl.load(tokens + token * 4 + 1).to(tl.int64)
            does = tl.load(tokens + token * 4 + 2)
            columns = tl.arange(0, BLOCK)
            for k in tl.static_range(GATES):
                at = k * rows + plan
                if tl.load(modes + at * 2) == layer:
                    mode = tl.load(modes + at * 2 + 1)
                    stream = tl.load(half + token * half_stride + columns, mask=columns < hidden, other=0.0)
                    read = stream.to(tl.float32)
                    if SUM:
                        second = tl.load(other + token * other_stride + columns, mask=columns < hidden, other=0.0)
                        read = (read + second.to(tl.float32)).to(stream.dtype).to(tl.float32)
                    weight = tl.load(weights + at * hidden + columns, mask=columns < hidden, other=0.0)
                    found = tl.sum(read * weight, axis=0) + tl.load(limits + at * 2)
                    tl.store(scores + k * count + token, found)
                    if (mode & 1) != 0:  # ONCE
                        if (does & 2) != 0:  # DECIDES
                            tl.store(values + k * value_rows + row, found)
                    else:
                        if (does & 4) != 0:  # COUNTS
                            tl.atomic_add(values + k * value_rows + row, found)

    @triton.jit
    def choose(  # type: ignore[no-untyped-def]
        layer,
        limits,
        modes,
        ends,
        choices,
        tokens,
        open_gates,
        values,
        counts,
        slots,
        scores,
        rows,
        value_rows,
        count_columns,
        count,
        GATES: tl.constexpr,
        TOGETHER: tl.constexpr,
    ):
        token = (tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)).to(tl.int64)
        inside = token < count
        plan = tl.load(tokens + token * 4, mask=inside, other=0).to(tl.int64)
        row = tl.load(tokens + token * 4 + 1, mask=inside, other=0).to(tl.int64)
        does = tl.load(tokens + token * 4 + 2, mask=inside, other=0)
        bits = tl.load(open_gates + token, mask=inside, other=0)
        touched = tl.zeros([TOGETHER], dtype=tl.int32)
        for k in tl.static_range(GATES):
            at = k * rows + plan
            where = tl.load(modes + at * 2)
            mode = tl.load(modes + at * 2 + 1)
            here = (plan != 0) & (where == layer) & ((does & 1) != 0)  # ACTS
            threshold = tl.load(limits + at * 2 + 1)
            stored = tl.load(values + k * value_rows + row, mask=here, other=0.0)
            now = tl.load(scores + k * count + token, mask=here, other=0.0)
            value = tl.where((mode & 1) != 0, stored, now)
            beyond = tl.where((mode & 2) != 0, value < threshold, value > threshold)  # BELOW
            opened = beyond | (((mode & 4) != 0) & (value == threshold))  # EQUAL
            changed = tl.where(opened, bits | (1 << k), bits & ~(1 << k))
            bits = tl.where(here, changed, bits)
            touched = tl.where(here, 1, touched)
        acted = inside & (touched != 0)
        sets: tl.constexpr = 1 << GATES
        tl.store(open_gates + token, bits, mask=inside)
        chosen = tl.load(choices + plan * sets + bits, mask=acted, other=0)
        tl.store(slots + token, chosen, mask=acted)
        last = tl.load(ends + plan * 2)
        number = tl.load(ends + plan * 2 + 1)
        final = acted & (last == layer) & ((does & 4) != 0)
        one = tl.full([TOGETHER], 1, dtype=tl.int32)
        tl.atomic_add(counts + row * count_columns + number * sets + bits, one, mask=final)

    return score, choose
