"""Attention for packed trees: each pack attends to the common prefix and to itself, under its own mask.

With the "sdpa" implementation each pack's attention is computed apart, so its cost is the sum of the packs' squares and
not the square of the sum; the linear layers still see all packs as one long row. With "eager" (whose code differs from
model to model) one block-diagonal mask says the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes import residual

NAME = "steer_tree"


class _Trees(NamedTuple):
    prefix: int
    masks: Sequence[Tensor]  # bool [tokens, prefix + tokens], one a pack, in order


_current: ContextVar[_Trees] = ContextVar("trees of the running pass")


@contextlib.contextmanager
def tree_attention(model: nn.Module, prefix: int, masks: Sequence[Tensor]) -> Iterator[Tensor]:
    """Within: the model attends by `masks` (bool [tokens, prefix + tokens] each). Yields the `attention_mask`."""
    config = residual.text_config(model)
    if config._attn_implementation != "sdpa":
        yield _additive(_block_diagonal(prefix, masks), next(model.parameters()).dtype)
        return
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    token = _current.set(_Trees(prefix, masks))
    config._attn_implementation = NAME
    try:
        # Four dimensions say that the mask is finished; `_attend` has its own, so this one is a stand-in.
        yield torch.ones(1, 1, 1, 1, dtype=torch.bool)
    finally:
        config._attn_implementation = "sdpa"
        _current.reset(token)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of query [1, heads, tokens, size] over keys [1, heads, prefix + tokens, size], pack by pack."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    prefix, masks = _current.get()
    outputs = []
    start = 0
    for mask in masks:
        stop = start + len(mask)
        own = slice(prefix + start, prefix + stop)
        keys, values = key[:, :, own], value[:, :, own]
        if prefix:
            keys = torch.cat([key[:, :, :prefix], keys], 2)
            values = torch.cat([value[:, :, :prefix], values], 2)
        output, _ = sdpa_attention_forward(module, query[:, :, start:stop], keys, values, mask[None, None], **options)
        outputs.append(output)
        start = stop
    return torch.cat(outputs, 1), None


def _block_diagonal(prefix: int, masks: Sequence[Tensor]) -> Tensor:
    """One mask [1, 1, tokens, prefix + tokens] that says what the packs' masks say."""
    blocks = torch.block_diag(*[mask[:, prefix:].float() for mask in masks]).bool()
    return torch.cat([blocks.new_ones(len(blocks), prefix), blocks], 1)[None, None]


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the numbers that eager attention adds to its scores."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
