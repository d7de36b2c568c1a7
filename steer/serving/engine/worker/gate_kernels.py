"""The gates of a layer, and of sections, as Triton kernels, for GPUs; the reference is the tensor code of `gates` and
`sections`.

As tensor code a gate takes some twenty kernels a layer, each of which costs a GPU more to begin than to do. Of the two
kernels of a layer the first computes the scores, a program a token, and stores what is decided in the rows of the
requests; the second, which reads the rows, chooses the slots, a program for many tokens. Two, since the token that
decides and the tokens that follow its decision can be in one step. Sections have one kernel, whose work for a request
is done by the program of its last token.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

TOGETHER = 128  # tokens of a program of the second kernel
SEEN = 64  # tokens of a request that the kernel of sections sees together


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
    half = half if half.stride(-1) == 1 else half.contiguous()
    other = other if other is None or other.stride(-1) == 1 else other.contiguous()
    gates, rows = weights.shape[0], weights.shape[1]
    scores = torch.empty(gates, count, dtype=torch.float32, device=half.device)
    block = 1 << (hidden - 1).bit_length()
    score, choose, _ = _kernels()
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
        BLOCK=block,
        num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
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


def section(
    ids: Tensor,
    markers: Tensor,
    marks: Tensor,
    modes: Tensor,
    ends: Tensor,
    choices: Tensor,
    tokens: Tensor,
    open_gates: Tensor,
    states: Tensor,
    counts: Tensor,
    slots: Tensor,
) -> None:
    """See the ids [tokens] of a step; the other tensors are those of GateTable and SectionTable."""
    count = min(ids.shape[0], tokens.shape[0])
    if count == 0:
        return
    see = _kernels()[2]
    see[(count,)](
        ids.contiguous(),
        markers,
        marks,
        modes,
        ends,
        choices,
        tokens,
        open_gates,
        states,
        counts,
        slots,
        marks.shape[0],
        markers.shape[1],
        modes.shape[1],
        counts.shape[1],
        GATES=modes.shape[0],
        TOGETHER=SEEN,
        num_warps=1,  # so that nothing is written which another warp has still to read
    )


@functools.cache
def _kernels() -> tuple[Any, Any, Any]:
    """The kernels, compiled at their first launch; Triton is imported only here, for a CPU needs none."""
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

    @triton.jit
    def see(  # type: ignore[no-untyped-def]
        ids,
        markers,
        marks,
        modes,
        ends,
        choices,
        tokens,
        open_gates,
        states,
        counts,
        slots,
        marker_count,
        longest,
        rows,
        count_columns,
        GATES: tl.constexpr,
        TOGETHER: tl.constexpr,
    ):
        last_token = tl.program_id(0).to(tl.int64)
        if (tl.load(tokens + last_token * 4 + 2) & 8) != 0:  # LAST
            row = tl.load(tokens + last_token * 4 + 1).to(tl.int64)
            first = tl.load(tokens + last_token * 4 + 3).to(tl.int64)
            state = tl.load(states + row * longest)
            thinking = state & 1
            calling = (state >> 1) & 1
            numbers = tl.arange(0, TOGETHER)
            earlier = numbers[None, :] <= numbers[:, None]
            for begin in range(first, last_token + 1, TOGETHER):
                token = begin + numbers.to(tl.int64)
                inside = token <= last_token
                kind = tl.zeros([TOGETHER], dtype=tl.int32)
                for p in range(marker_count):
                    fits = inside
                    for back in range(longest):
                        wanted = tl.load(markers + p * longest + longest - 1 - back)
                        at = token - back
                        here = at >= first
                        now = tl.load(ids + at, mask=inside & here, other=-1).to(tl.int32)
                        stored = tl.load(states + row * longest + longest + at - first, mask=inside & ~here, other=-1)
                        fits = fits & ((wanted < 0) | (tl.where(here, now, stored) == wanted))
                    kind = tl.where(fits, kind | tl.load(marks + p), kind)
                # A marker's place, twice, and 1 where it begins: the greatest so far is the last one.
                place = numbers * 2
                thought = tl.where((kind & 3) != 0, place + (kind & 1), -1)
                called = tl.where((kind & 12) != 0, place + ((kind >> 2) & 1), -1)
                thought = tl.max(tl.where(earlier, thought[None, :], -1), axis=1)
                called = tl.max(tl.where(earlier, called[None, :], -1), axis=1)
                thinks = tl.where(thought >= 0, thought & 1, thinking)
                calls = tl.where(called >= 0, called & 1, calling)
                plan = tl.load(tokens + token * 4, mask=inside, other=0).to(tl.int64)
                does = tl.load(tokens + token * 4 + 2, mask=inside, other=0)
                bits = tl.load(open_gates + token, mask=inside, other=0)
                touched = tl.zeros([TOGETHER], dtype=tl.int32)
                for k in tl.static_range(GATES):
                    where = tl.load(modes + (k * rows + plan) * 2)
                    mode = tl.load(modes + (k * rows + plan) * 2 + 1)
                    here = (plan != 0) & (where == -1) & ((does & 1) != 0)  # LAYER, ACTS
                    opened = tl.where(mode == 1, thinks, tl.where(mode == 0, 1 - thinks, 1 - calls)) != 0
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
                final = acted & (last == -1) & ((does & 4) != 0)  # COUNTS
                one = tl.full([TOGETHER], 1, dtype=tl.int32)
                tl.atomic_add(counts + row * count_columns + number * sets + bits, one, mask=final)
                newest = tl.max(thought, axis=0)
                thinking = tl.where(newest >= 0, newest & 1, thinking)
                newest = tl.max(called, axis=0)
                calling = tl.where(newest >= 0, newest & 1, calling)
            # Of this step, or from further on in what is stored, which is read before it is written.
            for column in range(1, longest):
                at = last_token - (longest - 1 - column)
                if at >= first:
                    tl.store(states + row * longest + column, tl.load(ids + at).to(tl.int32))
                else:
                    moved = tl.load(states + row * longest + longest + at - first)
                    tl.store(states + row * longest + column, moved)
            tl.store(states + row * longest, thinking | (calling << 1))

    return score, choose, see
