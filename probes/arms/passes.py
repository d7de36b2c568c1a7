"""Forward passes that begin above a layer whose residual stream is known, or that end at one; and the head alone.

The model's forward pass is the one of its class: the blocks below the layer return what is known instead of computing,
so masks, positions and everything above are the model's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes.arms.layout import Part
from probes.capture.hooks import block_outputs, run
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


Hook = Callable[..., Any]


class _Pass(NamedTuple):
    """What tells a pass from others that run at the same time, in other threads."""

    stream: Tensor | None  # [arms x rows, tokens, hidden], which the blocks up to the known layer return
    hooks: Mapping[int, Hook]  # of blocks, by layer


# From a number of arms and the hooks of their blocks, by layer, to what the head gets for each: see `passes`.
LastStates = Callable[[int, Mapping[int, Hook]], Tensor]
# From states [n, hidden] that went through the final norm to the logits [n, vocabulary], as the model makes them.
Head = Callable[[Tensor], Tensor]

_running: ContextVar[_Pass] = ContextVar("the running pass")
_headed: ContextVar[Tensor] = ContextVar("the states that the head gets")


def stream_at(model: nn.Module, part: Part, layer: int, known: tuple[int, Tensor] | None = None) -> Tensor:
    """The unsteered residual stream at a layer, [rows, tokens, hidden] in the model's dtype.

    `known` is a lower layer with its stream, above which the pass begins.
    """
    states: list[Tensor] = []
    with (
        _forward_passes(model, part, known) as forward,
        block_outputs(model, [layer], lambda _position, output: states.append(output)),
    ):
        forward(1, {})
    return states[0]


@contextlib.contextmanager
def passes(model: nn.Module, part: Part, known: tuple[int, Tensor]) -> Iterator[LastStates]:
    """A context that gives a function, which threads may call at the same time, for forward passes above a layer.

    From a number of arms, for each of which the stream of `known` stands once, the rows of an arm together, and from
    the hooks of blocks by layer, the function makes what the head gets, after the final norm, at `part.kept`:
    [arms, n, hidden].
    """
    with _forward_passes(model, part, known) as forward:
        yield lambda arms, hooks: forward(arms, hooks)[0].unflatten(0, (arms, -1)).flatten(1, 2)[:, part.kept]


@contextlib.contextmanager
def heads(model: Any) -> Iterator[Head]:
    """A context that gives the head of the model as a function, which threads may call at the same time."""

    def known(*_args: Any, **_kwargs: Any) -> _DecoderOutput:
        return _DecoderOutput(_headed.get()[None])

    def logits(states: Tensor) -> Tensor:
        token = _headed.set(states)
        try:
            made: Tensor = model(input_ids=torch.zeros(1, len(states), dtype=torch.int64), use_cache=False).logits[0]
            return made
        finally:
            _headed.reset(token)

    with _replaced_forward({residual.decoder(model): known}):
        yield logits


@contextlib.contextmanager
def _forward_passes(
    model: nn.Module, part: Part, known: tuple[int, Tensor] | None
) -> Iterator[Callable[[int, Mapping[int, Hook]], Any]]:
    """A context that gives a function from a number of arms and their hooks to the output of the decoder without the
    head, with each row of `part` once for each arm; None where a hook ends the pass before."""
    blocks = residual.blocks(model)
    first = 0 if known is None else known[0]
    with contextlib.ExitStack() as stack:
        if known is not None:
            stack.enter_context(_replaced_forward(dict.fromkeys(blocks[: first + 1], _known_stream)))
        for layer in range(first, len(blocks)):
            stack.callback(blocks[layer].register_forward_hook(_hook_of(layer), prepend=True).remove)
        inputs: dict[str, Any] = {"use_cache": False}
        if part.masks is not None:
            mask = stack.enter_context(tree_attention(model, part.prefix, part.masks, in_row=True))
            inputs |= {"attention_mask": mask, "position_ids": part.depths}

        def forward(arms: int, hooks: Mapping[int, Hook]) -> Any:
            rows = {"input_ids": part.ids.repeat(arms, 1)}
            if part.masks is None:
                rows["attention_mask"] = (part.depths >= 0).long().repeat(arms, 1)
            token = _running.set(_Pass(None if known is None else known[1].repeat(arms, 1, 1), hooks))
            try:
                return run(residual.decoder(model), **inputs, **rows)
            finally:
                _running.reset(token)

        yield forward


def _known_stream(*_args: Any, **_kwargs: Any) -> Tensor:
    """The forward pass of a block up to the known layer."""
    stream = _running.get().stream
    assert stream is not None
    return stream


def _hook_of(layer: int) -> Hook:
    def hook(block: nn.Module, inputs: Any, output: Any) -> Any:
        of_pass = _running.get().hooks.get(layer)
        return None if of_pass is None else of_pass(block, inputs, output)

    return hook


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
