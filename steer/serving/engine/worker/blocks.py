"""The decoder blocks of the served model, steered at their outputs.

A block's class is replaced by a subclass whose forward adds, for every token, what the token's slot holds. On a CPU it
is plain tensor code, through which torch.compile traces; on a GPU one kernel (`kernels.stream`), which to torch.compile
is an operator. All of it works on buffers at fixed addresses, so CUDA graphs replay it. The projection directions are a
loop instead of one gather, so that no temporary is larger than the residual stream. Where the output holds the residual
stream has been proved on the loaded model (`proof.prove`). A block that gates read gives its steered stream to them
(`gates`), which may change what slots the blocks above it see.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steer.serving.engine.bounds import LONGEST
from steer.serving.engine.proving.forms import Form, Proved
from steer.serving.engine.worker import steps as stepping
from steer.serving.engine.worker.gates import GateTable, read
from steer.serving.engine.worker.kernels import stream as _operator  # noqa: F401  # defines torch.ops.steer.steered
from steer.serving.engine.worker.slots import SlotTable

# The largest magnitude to which steering may bring a value of a float16 residual stream: half of float16's range.
HALF = 32_000.0


def install(blocks: Mapping[int, Proved], table: SlotTable, slots: Tensor, gates: GateTable | None = None) -> None:
    """Make the blocks of a loaded model read the slot table; `slots` [tokens] is the slot of every token of a step.

    The blocks at the layers of `gates` are read by them.
    """
    # The kernel has no steps; with them, torch.compile fuses the tensor code.
    in_one_kernel = slots.is_cuda and not table.steps
    add = _add_in_one_kernel if in_one_kernel else _add
    for i, layer in enumerate(table.layers):
        block, form = blocks[layer]
        block.register_buffer("steer_slots", slots, persistent=False)
        block.register_buffer("steer_added", table.added[i], persistent=False)
        block.register_buffer("steer_units", table.units[i], persistent=False)
        block.register_buffer("steer_factors", table.factors[i], persistent=False)
        block.register_buffer("steer_step_units", table.step_units[i], persistent=False)
        block.register_buffer("steer_step_factors", table.step_factors[i], persistent=False)
        if gates is not None and layer in gates.layers:
            gates.join(block, layer)
            block.__class__ = steered_class(type(block), form, _and_read(add))
        else:
            block.__class__ = steered_class(type(block), form, add)


# Adds the change to the first tensor, which is the residual stream, or of which the second is the other half.
Add = Callable[[Any, Tensor, Tensor | None], Tensor]

_CLASSES: dict[tuple[type[nn.Module], Form, Add], type[nn.Module]] = {}


def steered_class(plain: type[nn.Module], form: Form, add: Add) -> type[nn.Module]:
    """The subclass of a block's class that steers the block's output; one per class, form and way to add."""
    key = plain, form, add
    if key not in _CLASSES:
        # Several functions rather than one with branches, because torch.compile caches by code object.
        if form.parts is None:
            forward = _forward_batched(plain, add) if form.batched else _forward_whole(plain, add)
        else:
            first, *others = form.parts
            forward = _forward_sum(plain, first, others[0], add) if others else _forward_part(plain, first, add)
        _CLASSES[key] = type(f"Steered{plain.__name__}", (plain,), {"forward": forward})
    return _CLASSES[key]


def _forward_whole(plain: type[nn.Module], add: Add) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return add(self, plain.forward(self, *args, **kwargs), None)

    return forward


def _forward_batched(plain: type[nn.Module], add: Add) -> Any:
    """The stream is [1, tokens, hidden]."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return add(self, plain.forward(self, *args, **kwargs)[0], None)[None]

    return forward


def _forward_part(plain: type[nn.Module], part: int, add: Add) -> Any:
    """The stream is one part of the tuple."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        output = plain.forward(self, *args, **kwargs)
        return (*output[:part], add(self, output[part], None), *output[part + 1 :])

    return forward


def _forward_sum(plain: type[nn.Module], first: int, second: int, add: Add) -> Any:
    """The stream is the sum of two parts of the tuple; the change is added to the first, which is the smaller one."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        output = plain.forward(self, *args, **kwargs)
        return (*output[:first], add(self, output[first], output[second]), *output[first + 1 :])

    return forward


def _add(block: Any, half: Tensor, other: Tensor | None) -> Tensor:
    stream = half if other is None else half + other
    tables = block.steer_added, block.steer_units, block.steer_factors
    steps = block.steer_step_units, block.steer_step_factors
    change = change_of(stream, block.steer_slots, *tables, steps)
    return (half + change).to(half.dtype)


def _add_in_one_kernel(block: Any, half: Tensor, other: Tensor | None) -> Tensor:
    limit = HALF if half.dtype == torch.float16 else 0.0
    tables = block.steer_slots, block.steer_added, block.steer_units, block.steer_factors
    result: Tensor = torch.ops.steer.steered(half, other, *tables, limit)
    return result


@functools.cache
def _and_read(add: Add) -> Add:
    """The same for a block that gates read: they read the stream as it is afterwards, in the model's dtype."""

    def add_and_read(block: Any, half: Tensor, other: Tensor | None) -> Tensor:
        result = add(block, half, other)
        read(block, result, other, block.steer_slots)
        return result

    return add_and_read


def change_of(
    stream: Tensor,
    slots: Tensor,
    added: Tensor,
    units: Tensor,
    factors: Tensor,
    steps: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What steering adds to the residual stream [tokens, hidden], float32; exactly zero for tokens in slot 0.

    `slots` [tokens] is the slot of each token; `added` is [slots, hidden], `units` [K, slots, hidden], `factors`
    [K, slots, 2]; `steps` are the units [S, slots, hidden] and factors [S, slots, 6] of steps. The change is limited,
    so that no value of the stream overflows by it.
    """
    is_float16 = stream.dtype == torch.float16
    slots = slots[: stream.shape[0]]
    stream = stream.to(torch.float32)
    change = added.index_select(0, slots)
    for k in range(units.shape[0]):
        unit = units[k].index_select(0, slots)
        factor = factors[k].index_select(0, slots)
        component = (stream * unit).sum(-1, keepdim=True)
        change = change + (factor[:, :1] + factor[:, 1:] * component) * unit
    if steps is not None:
        change = stepping.change_of(stream, change, slots, *steps)
    # An ablation by more than 2 multiplies what it removes at every layer, and would overflow after some of them.
    if is_float16:
        low, high = (-HALF - stream).clamp(max=0), (HALF - stream).clamp(min=0)
        return torch.minimum(torch.maximum(change, low), high)
    return change.clamp(-LONGEST, LONGEST)
