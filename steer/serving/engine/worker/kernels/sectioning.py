"""Sections as one Triton kernel, for GPUs; the reference is the tensor code of `sections`.

The program of a request's last token in the step does the work for all tokens of the request, one block after another;
the programs of the other tokens end at once.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

TOGETHER = 64  # tokens of a block


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
    _kernel()[(count,)](
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
        TOGETHER=TOGETHER,
        num_warps=1,  # so that nothing is written which another warp has still to read
    )


@functools.cache
def _kernel() -> Any:
    """The kernel, compiled at its first launch; Triton is imported only here, for a CPU needs none."""
    import triton
    import triton.language as tl

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

    return see
