"""The decoder blocks of the served model, steered at their outputs.

A block's class is replaced by a subclass whose forward adds, for every token, what the token's slot holds. It is plain
tensor code on buffers at fixed addresses, so torch.compile traces through it and CUDA graphs replay it. The projection
directions are a loop instead of one gather, so that no temporary is larger than the residual stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steer.serving.engine.bounds import LONGEST
from steer.serving.engine.worker.slots import SlotTable

# What vLLM's blocks return: "halves" is (MLP output, residual), whose sum is the residual stream; "whole" is the
# residual stream. Only blocks that a test compares with transformers are listed.
RETURNS = {
    "LlamaDecoderLayer": "halves",
    "MistralDecoderLayer": "halves",
    "Qwen2DecoderLayer": "halves",
    "Qwen3DecoderLayer": "halves",
    "Gemma2DecoderLayer": "halves",
    "Gemma3DecoderLayer": "halves",
    "MixtralDecoderLayer": "halves",
    "GPT2Block": "whole",
}

# The largest magnitude to which steering may bring a value of a float16 residual stream: half of float16's range.
HALF = 32_000.0


def decoder_blocks(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder blocks in this process, by layer. Raises ValueError for an unsupported model."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(type(block).__name__ in RETURNS for block in module)
    ]
    if len(lists) != 1:
        known = ", ".join(sorted(RETURNS))
        raise ValueError(
            f"steer: {type(model).__name__} has {len(lists)} lists of supported decoder blocks, not one; "
            f"supported are {known}. To serve the model without the plugin, unset VLLM_PLUGINS"
        )
    # With pipeline parallelism, the blocks of other processes are placeholders of another class.
    return {i: block for i, block in enumerate(lists[0][1]) if type(block).__name__ in RETURNS}


def install(model: nn.Module, table: SlotTable, slots: Tensor) -> None:
    """Make the blocks of a loaded model read the slot table; `slots` [tokens] is the slot of every token of a step."""
    blocks = decoder_blocks(model)
    for i, layer in enumerate(table.layers):
        block = blocks[layer]
        block.register_buffer("steer_slots", slots, persistent=False)
        block.register_buffer("steer_added", table.added[i], persistent=False)
        block.register_buffer("steer_units", table.units[i], persistent=False)
        block.register_buffer("steer_factors", table.factors[i], persistent=False)
        block.__class__ = _steered(type(block))


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _steered(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a block's class that steers the block's output; one per class."""
    if plain not in _CLASSES:
        # Two functions rather than one with a branch, because torch.compile caches by code object.
        forward = _forward_halves(plain) if RETURNS[plain.__name__] == "halves" else _forward_whole(plain)
        _CLASSES[plain] = type(f"Steered{plain.__name__}", (plain,), {"forward": forward})
    return _CLASSES[plain]


def _forward_halves(plain: type[nn.Module]) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        hidden, residual = plain.forward(self, *args, **kwargs)
        stream = hidden + residual
        change = change_of(stream, self.steer_slots, self.steer_added, self.steer_units, self.steer_factors)
        return (hidden + change).to(hidden.dtype), residual

    return forward


def _forward_whole(plain: type[nn.Module]) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        hidden = plain.forward(self, *args, **kwargs)
        change = change_of(hidden, self.steer_slots, self.steer_added, self.steer_units, self.steer_factors)
        return (hidden + change).to(hidden.dtype)

    return forward


def change_of(stream: Tensor, slots: Tensor, added: Tensor, units: Tensor, factors: Tensor) -> Tensor:
    """What steering adds to the residual stream [tokens, hidden], float32; exactly zero for tokens in slot 0.

    `slots` [tokens] is the slot of each token; `added` is [slots, hidden], `units` [K, slots, hidden], `factors`
    [K, slots, 2]. The change is limited, so that no value of the stream overflows by it.
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
    # An ablation by more than 2 multiplies what it removes at every layer, and would overflow after some of them.
    if is_float16:
        low, high = (-HALF - stream).clamp(max=0), (HALF - stream).clamp(min=0)
        return torch.minimum(torch.maximum(change, low), high)
    return change.clamp(-LONGEST, LONGEST)
