"""Attention for packed trees: each pack attends to the common prefix and to itself, under its own mask.

With the "sdpa" implementation, packs of similar length attend as one batch, so the cost is about the sum of the squared
pack sizes, not the square of their sum; linear layers still see all packs as one long row. With "eager", whose code
differs between models, one block-diagonal mask has the same effect.
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
ALIKE = 32  # packs up to this many tokens share a batch, however different their lengths


class _Group(NamedTuple):
    """Packs of similar length as one batch: B packs of at most T tokens.

    `queries` [B, T] and `keys` [B, prefix + T] are positions in the row; short packs are padded with their first token.
    `mask` [B, 1, T, prefix + T] is added to the scores. `rows` [tokens] are the positions in the row of the tokens at
    `positions` [tokens] of the flattened batch; padding is left out.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor
    rows: Tensor
    positions: Tensor


_current: ContextVar[list[_Group]] = ContextVar("trees of the running pass")


@contextlib.contextmanager
def tree_attention(model: nn.Module, prefix: int, masks: Sequence[Tensor], *, in_row: bool = False) -> Iterator[Tensor]:
    """Within: the model attends by `masks` (bool [tokens, prefix + tokens] each). Yields the `attention_mask`.

    The tokens of the prefix are in the model's cache; or, with `in_row`, at the beginning of the row itself. A batch
    may hold several rows of the same packs.
    """
    config = residual.text_config(model)
    dtype = next(model.parameters()).dtype
    if config._attn_implementation != "sdpa":
        yield _additive(_block_diagonal(prefix, masks, in_row), dtype)
        return
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    token = _current.set(_groups(prefix, masks, dtype, in_row))
    config._attn_implementation = NAME
    try:
        # A placeholder: transformers leaves a mask of four dimensions as it is, and `_attend` has its own.
        yield torch.ones(1, 1, 1, 1, dtype=torch.bool)
    finally:
        config._attn_implementation = "sdpa"
        _current.reset(token)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of query [rows, heads, tokens, size] over keys [rows, heads, prefix + tokens, size], by group."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    outputs: Tensor | None = None
    rows = len(query)
    for group in _current.get():
        batch = [
            states[:, :, positions].transpose(1, 2).flatten(0, 1)
            for states, positions in ((query, group.queries), (key, group.keys), (value, group.keys))
        ]
        mask = group.mask.to(query.dtype)
        output, _ = sdpa_attention_forward(module, *batch, mask.repeat(rows, 1, 1, 1) if rows > 1 else mask, **options)
        if outputs is None:
            outputs = output.new_empty(rows, query.shape[2], *output.shape[2:])
        outputs[:, group.rows] = output.unflatten(0, (rows, -1)).flatten(1, 2)[:, group.positions]
    assert outputs is not None
    return outputs, None


def _groups(prefix: int, masks: Sequence[Tensor], dtype: torch.dtype, in_row: bool) -> list[_Group]:
    """The packs of a row, batched by length, since one attention call per pack would be dominated by its overhead."""
    offset = prefix if in_row else 0
    starts = itertools.accumulate((len(mask) for mask in masks), initial=offset)
    batches: list[list[tuple[int, Tensor]]] = []
    for start, mask in sorted(zip(starts, masks, strict=False), key=lambda each: len(each[1])):
        if not batches or len(mask) > max(ALIKE, 1.5 * len(batches[-1][0][1])):
            batches.append([])
        batches[-1].append((start, mask))
    groups = [_group(prefix, packs, dtype, prefix - offset) for packs in batches]
    if offset:
        alone = torch.ones(prefix, prefix, dtype=torch.bool, device=masks[0].device).tril()
        groups.append(_group(0, [(0, alone)], dtype, 0))
    return groups


def _group(prefix: int, packs: Sequence[tuple[int, Tensor]], dtype: torch.dtype, cached: int) -> _Group:
    """One batch of packs, each given by its first position in the row and its mask; `cached` keys precede the row."""
    width = max(len(mask) for _, mask in packs)
    device = packs[0][1].device
    steps = torch.arange(width)
    sizes = torch.tensor([len(mask) for _, mask in packs])[:, None]
    firsts = torch.tensor([start for start, _ in packs])[:, None]
    real = steps < sizes
    queries = firsts + steps * real
    keys = torch.cat([torch.arange(prefix).expand(len(packs), prefix), cached + queries], 1)
    # Padding may attend to everything, since softmax needs at least one key; no other token attends to it.
    visible = torch.ones(len(packs), width, prefix + width, dtype=torch.bool, device=device)
    for pack_mask, (_, mask) in zip(visible, packs, strict=True):
        pack_mask[: len(mask)] = False
        pack_mask[: len(mask), : mask.shape[1]] = mask
    positions = real.flatten().nonzero()[:, 0]
    moved = (each.to(device) for each in (queries, keys, queries[real], positions))
    queries, keys, rows, positions = moved
    return _Group(queries, keys, _additive(visible, dtype)[:, None], rows, positions)


def _block_diagonal(prefix: int, masks: Sequence[Tensor], in_row: bool) -> Tensor:
    """The masks of all packs as one block-diagonal mask [1, 1, tokens, prefix + tokens]; `in_row` with the prefix's."""
    blocks = torch.block_diag(*[mask[:, prefix:].float() for mask in masks]).bool()
    visible = torch.cat([blocks.new_ones(len(blocks), prefix), blocks], 1)
    if in_row:
        above = blocks.new_ones(prefix, prefix).tril()
        visible = torch.cat([torch.cat([above, blocks.new_zeros(prefix, len(blocks))], 1), visible])
    return visible[None, None]


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the numbers that eager attention adds to its scores."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
