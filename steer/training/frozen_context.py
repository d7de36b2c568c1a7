"""Training on completions alone, behind a context (the prompt) whose cached states stay fixed.

The context is computed once, without gradients. Its cache (keys and values, the last inputs of convolutions, recurrent
states) is passed to every forward pass over the segment that follows; only the segment is computed and trained.
Gradients reach every weight that the segment's tokens use, but do not flow through the context. So the frozen states
grow stale as the weights change: `staleness` measures by how much. At inference the context is encoded by the trained
weights, so evaluate a trained model with fresh contexts.

A token is predicted from the token before it, so a segment begins with the last token of the prompt, and the context
ends before that token; `split` cuts examples there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from probes.models import residual
from vectors.errors import ModelError, UsageError

IGNORED = -100  # the label of a token that is not trained on


class FrozenContext(NamedTuple):
    """Contexts [rows, length], padded on the left, and their cache, which nothing writes to."""

    input_ids: Tensor
    attention_mask: Tensor
    cache: DynamicCache


class Split(NamedTuple):
    """Examples cut into contexts, padded on the left, and segments with their labels, padded on the right.

    Contexts are [rows, longest context], segments and labels [rows, longest segment]; masks are 1 at tokens, 0 at
    padding. A label is the token at its position, or IGNORED.
    """

    context_ids: Tensor
    context_mask: Tensor
    segment_ids: Tensor
    segment_mask: Tensor
    labels: Tensor


class _ReadOnlyKeys(DynamicLayer):
    """Keys and values of full attention: new ones are appended to a copy, never stored."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class _ReadOnlyWindow(DynamicSlidingWindowLayer):
    """Keys and values of sliding-window attention, read only in the same way."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class _ReadOnlyStates(LinearAttentionLayer):
    """Convolution and recurrent states, read only: autograd has saved them for the backward pass."""

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, *args: Any, **kwargs: Any) -> Tensor:
        return torch.cat([self.conv_states[state_idx], conv_states], dim=-1)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        return recurrent_states


_READ_ONLY = {
    DynamicLayer: _ReadOnlyKeys,
    DynamicSlidingWindowLayer: _ReadOnlyWindow,
    LinearAttentionLayer: _ReadOnlyStates,
}


def split(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, pad: int = 0) -> Split:
    """Cut examples [rows, length] before the token that predicts the first label; padding may be on either side.

    Raises UsageError for an example without a label, or whose first token is labelled: nothing predicts it.
    """
    contexts: list[Tensor] = []
    segments: list[Tensor] = []
    segment_labels: list[Tensor] = []
    problems = []
    for row, (ids, mask, row_labels) in enumerate(zip(input_ids, attention_mask.bool(), labels, strict=True)):
        ids, row_labels = ids[mask], row_labels[mask]
        labelled = (row_labels != IGNORED).nonzero()
        if not len(labelled) or int(labelled[0]) == 0:
            reason = "no label" if not len(labelled) else "a label on its first token, which nothing predicts"
            problems.append(f"example {row + 1} of the batch has {reason}")
            continue
        start = int(labelled[0]) - 1
        contexts.append(ids[:start])
        segments.append(ids[start:])
        segment_labels.append(row_labels[start:])
    if problems:
        raise UsageError(problems, "leave these examples out, or do not truncate their completions")
    context_ids, context_mask = _padded(contexts, pad, left=True)
    segment_ids, segment_mask = _padded(segments, pad, left=False)
    return Split(context_ids, context_mask, segment_ids, segment_mask, _padded(segment_labels, IGNORED, left=False)[0])


def freeze(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> FrozenContext:
    """Compute contexts [rows, length], padded on the left, once, in evaluation mode and without gradients.

    A row may be empty (all padding). Raises UsageError for other padding, ModelError for a model whose states can't be
    frozen.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if mask.shape != input_ids.shape or not input_ids.numel() or bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise UsageError(
            f"contexts {list(input_ids.shape)} with a mask {list(mask.shape)} are not padded on the left alone",
            "put the padding before each context",
        )
    cache = DynamicCache(config=residual.text_config(model))
    unknown = {type(layer).__name__ for layer in cache.layers if type(layer) not in _READ_ONLY}
    if unknown or not cache.layers:
        raise _unfreezable(model, f"its states are {', '.join(sorted(unknown)) or 'unknown'}")
    if any(isinstance(layer, LinearAttentionLayer) for layer in cache.layers) and not residual.continues(model):
        raise _unfreezable(model, "it is not known that its recurrent states go on over several tokens at once")
    try:
        with torch.no_grad(), _evaluating(model):
            model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=_positions(mask),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
    except (TypeError, ValueError) as error:  # raised by models that use a cache class of their own
        raise _unfreezable(model, str(error)) from error
    if not all(_filled(layer) for layer in cache.layers):
        raise _unfreezable(model, "it does not keep its states in the cache")
    for layer in cache.layers:
        layer.__class__ = _READ_ONLY[type(layer)]
        layer.record_past = True  # a segment of one token would otherwise write to the states
    return FrozenContext(input_ids, mask, cache)


def continued(
    model: Any, context: FrozenContext, segment_ids: Tensor, segment_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Logits [rows, segment, vocabulary] of segments after their contexts; segments are padded on the right.

    Gradients are computed if the caller enabled them; gradient checkpointing works too. `options` are passed to the
    model (`logits_to_keep`). Raises UsageError when segments and contexts differ in number.
    """
    if segment_ids.shape[0] != context.input_ids.shape[0]:
        raise UsageError(f"{segment_ids.shape[0]} segments for {context.input_ids.shape[0]} contexts")
    mask = torch.ones_like(segment_ids) if segment_mask is None else segment_mask.long()
    whole = torch.cat([context.attention_mask, mask], dim=1)
    with _checkpointing_reads_the_cache(model):
        output = model(
            input_ids=segment_ids,
            attention_mask=whole,
            position_ids=_positions(whole)[:, context.attention_mask.shape[1] :],
            past_key_values=context.cache,
            use_cache=False,
            **options,
        )
    logits: Tensor = output.logits
    return logits


def staleness(
    model: Any, context: FrozenContext, segment_ids: Tensor, segment_mask: Tensor | None = None
) -> tuple[float, FrozenContext]:
    """How far the predictions behind frozen contexts are from those behind fresh ones; and the fresh contexts.

    KL(fresh || frozen) of the next token in nats, the mean over the segments' tokens, in evaluation mode. Segments are
    [rows, length], padded on the right.
    """
    fresh = freeze(model, context.input_ids, context.attention_mask)
    mask = torch.ones_like(segment_ids) if segment_mask is None else segment_mask
    with torch.no_grad(), _evaluating(model):
        new, old = (
            continued(model, c, segment_ids, mask)[mask.bool()].float().log_softmax(-1) for c in (fresh, context)
        )
    return float((new.exp() * (new - old)).sum(-1).mean().clamp(min=0)), fresh


def _unfreezable(model: Any, reason: str) -> ModelError:
    return ModelError(
        f"the context of {type(model).__name__} can't be frozen: {reason}", "train with the whole context instead"
    )


def _filled(layer: Any) -> bool:
    """Whether the forward pass has written to this layer of the cache."""
    if isinstance(layer, LinearAttentionLayer):
        return all(layer.has_previous_state.values())
    return bool(layer.is_initialized)


def _positions(mask: Tensor) -> Tensor:
    """The position of every token, not counting padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _padded(rows: list[Tensor], value: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of several lengths as one tensor, and its mask; at least one column, so that a model accepts it."""
    width = max(1, *(len(row) for row in rows))
    batch = rows[0].new_full((len(rows), width), value)
    mask = torch.zeros_like(batch)
    for number, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        batch[number, columns] = row
        mask[number, columns] = 1
    return batch, mask


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within: evaluation mode, without dropout or gradient checkpointing (which would disable the cache)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _checkpointing_reads_the_cache(model: nn.Module) -> Iterator[None]:
    """Within: layers under gradient checkpointing still use the cache, which is safe since nothing writes to it."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [layer.__dict__.get("_can_checkpoint_with_cache") for layer in layers]
    for layer in layers:
        layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            if value is None:
                del layer._can_checkpoint_with_cache
            else:
                layer._can_checkpoint_with_cache = value
