"""Attention for packed trees: each pack attends to the common prefix and to itself, under its own mask.

With the "sdpa" implementation packs of like length attend as one batch, so the cost is about the sum of the packs'
squares and not the square of the sum; the linear layers still see all packs as one long row. With "eager" (whose code
differs from model to model) one block-diagonal mask says the same.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes.models import residual

NAME = "steer_tree"
ALIKE = 32  # tokens up to which packs may share a batch, however unlike their lengths


class _Group(NamedTuple):
    """Packs of like length as one batch: B packs of at most T tokens.

    `queries` [B, T] and `keys` [B, prefix + T] are places in the row, short packs filled up with their own first token;
    `mask` [B, 1, T, prefix + T] is added to the scores; `rows` and `places` [tokens] say which place of the row each
    token of the flattened batch goes to, filling left out.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor
    rows: Tensor
    places: Tensor


_current: ContextVar[list[_Group]] = ContextVar("trees of the running pass")


@contextlib.contextmanager
def tree_attention(model: nn.Module, prefix: int, masks: Sequence[Tensor]) -> Iterator[Tensor]:
    """Within: the model attends by `masks` (bool [tokens, prefix + tokens] each). Yields the `attention_mask`."""
    config = residual.text_config(model)
    dtype = next(model.parameters()).dtype
    if config._attn_implementation != "sdpa":
        yield _additive(_block_diagonal(prefix, masks), dtype)
        return
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    token = _current.set(_groups(prefix, masks, dtype))
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
    """Attention of query [1, heads, tokens, size] over keys [1, heads, prefix + tokens, size], group by group."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    outputs: Tensor | None = None
    for group in _current.get():
        batch = [
            states[0][:, places].transpose(0, 1)
            for states, places in ((query, group.queries), (key, group.keys), (value, group.keys))
        ]
        output, _ = sdpa_attention_forward(module, *batch, group.mask.to(query.dtype), **options)
        if outputs is None:
            outputs = output.new_empty(1, query.shape[2], *output.shape[2:])
        outputs[0, group.rows] = output.flatten(0, 1)[group.places]
    assert outputs is not None
    return outputs, None


def _groups(prefix: int, masks: Sequence[Tensor], dtype: torch.dtype) -> list[_Group]:
    """The packs that stand side by side in a row, by length: a call for each would cost more than what it computes."""
    starts = itertools.accumulate((len(mask) for mask in masks), initial=0)
    found: list[list[tuple[int, Tensor]]] = []
    for start, mask in sorted(zip(starts, masks, strict=False), key=lambda each: len(each[1])):
        if not found or len(mask) > max(ALIKE, 1.5 * len(found[-1][0][1])):
            found.append([])
        found[-1].append((start, mask))
    return [_group(prefix, packs, dtype) for packs in found]


def _group(prefix: int, packs: Sequence[tuple[int, Tensor]], dtype: torch.dtype) -> _Group:
    """One batch of packs, each given by its first place in the row and its mask."""
    width = max(len(mask) for _, mask in packs)
    device = packs[0][1].device
    steps = torch.arange(width)
    sizes = torch.tensor([len(mask) for _, mask in packs])[:, None]
    firsts = torch.tensor([start for start, _ in packs])[:, None]
    real = steps < sizes
    queries = firsts + steps * real
    keys = torch.cat([torch.arange(prefix).expand(len(packs), prefix), prefix + queries], 1)
    # What fills up may see all, for softmax needs something to see, and is seen by none but its like.
    visible = torch.ones(len(packs), width, prefix + width, dtype=torch.bool, device=device)
    for one, (_, mask) in zip(visible, packs, strict=True):
        one[: len(mask)] = False
        one[: len(mask), : mask.shape[1]] = mask
    places = real.flatten().nonzero()[:, 0]
    moved = (each.to(device) for each in (queries, keys, queries[real], places))
    queries, keys, rows, places = moved
    return _Group(queries, keys, _additive(visible, dtype)[:, None], rows, places)


def _block_diagonal(prefix: int, masks: Sequence[Tensor]) -> Tensor:
    """One mask [1, 1, tokens, prefix + tokens] that says what the packs' masks say."""
    blocks = torch.block_diag(*[mask[:, prefix:].float() for mask in masks]).bool()
    return torch.cat([blocks.new_ones(len(blocks), prefix), blocks], 1)[None, None]


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the numbers that eager attention adds to its scores."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
