"""Forward passes that begin above a layer whose residual stream is known, or that end at one; and the head alone.

The model's forward pass is the one of its class: the blocks below the layer return what is known instead of computing,
so masks, positions and everything above are the model's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from probes.arms.layout import Part
from probes.capture.tree_attention import tree_attention
from probes.models import residual


class _DecoderOutput:
    """What the class of a model reads of its decoder's output: the last states, and nothing else (caches, routers)."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, _name: str) -> None:
        return None


class _LayerReached(Exception):
    """Raised behind the last layer that is wanted, to skip those above it."""


def stream_at(model: nn.Module, part: Part, layer: int, known: tuple[int, Tensor] | None = None) -> Tensor:
    """The unsteered residual stream at a layer, [rows, tokens, hidden] in the model's dtype.

    `known` is a lower layer with its stream, above which the pass begins.
    """
    states: list[Tensor] = []

    def receive(_block: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(residual.output_of(output))
        raise _LayerReached

    handle = residual.blocks(model)[layer].register_forward_hook(receive)
    try:
        with contextlib.suppress(_LayerReached):
            _forward(model, part, 1, known, {})
    finally:
        handle.remove()
    return states[0]


def last_states(
    model: nn.Module,
    part: Part,
    known: tuple[int, Tensor],
    arms: int,
    hooks: Mapping[int, Callable[..., Any]],
) -> Tensor:
    """What the head gets, after the final norm, at `part.kept`: [arms, n, hidden].

    The stream of `known` stands once for each arm, the rows of an arm together; `hooks` are those of blocks, by layer.
    """
    output = _forward(model, part, arms, known, hooks)
    return output[0].unflatten(0, (arms, -1)).flatten(1, 2)[:, part.kept]


def head_logits(model: Any, states: Tensor) -> Tensor:
    """The logits [n, vocabulary] of states [n, hidden] that went through the final norm, as the model makes them."""

    def known(*_args: Any, **_kwargs: Any) -> _DecoderOutput:
        return _DecoderOutput(states[None])

    with _replaced_forward({residual.decoder(model): known}):
        logits: Tensor = model(input_ids=torch.zeros(1, len(states), dtype=torch.int64), use_cache=False).logits[0]
    return logits


def _forward(
    model: nn.Module,
    part: Part,
    arms: int,
    known: tuple[int, Tensor] | None,
    hooks: Mapping[int, Callable[..., Any]],
) -> Any:
    """The output of the decoder without the head, with each row of `part` once for each arm."""
    blocks = residual.blocks(model)
    rows = {"input_ids": part.ids.repeat(arms, 1), "use_cache": False}
    with contextlib.ExitStack() as stack:
        if known is not None:
            layer, states = known
            stream = states.repeat(arms, 1, 1)
            stack.enter_context(_replaced_forward({block: _returns(stream) for block in blocks[: layer + 1]}))
        for layer, hook in hooks.items():
            stack.callback(blocks[layer].register_forward_hook(hook, prepend=True).remove)
        if part.masks is not None:
            mask = stack.enter_context(tree_attention(model, part.prefix, part.masks, in_row=True))
            rows |= {"attention_mask": mask, "position_ids": part.depths}
        else:
            rows["attention_mask"] = (part.depths >= 0).long().repeat(arms, 1)
        return residual.decoder(model)(**rows)


def _returns(stream: Tensor) -> Callable[..., Tensor]:
    def forward(*_args: Any, **_kwargs: Any) -> Tensor:
        return stream

    return forward


@contextlib.contextmanager
def _replaced_forward(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """A context in which modules compute something else; their hooks run as before."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, previous in before.items():
            if previous is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = previous
