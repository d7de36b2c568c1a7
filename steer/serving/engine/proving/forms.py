"""Where the outputs of a model's blocks may hold the residual stream, and the passes that tell which it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steer.serving.engine.proving.trace import EditInputs, EditOutput, Step, Trace, is_stream, record, shape_of


class Form(NamedTuple):
    """Where a block's output holds the residual stream: the output itself, or the sum of these parts of a tuple.

    `batched`: the stream is [1, tokens, hidden] instead of [tokens, hidden].
    """

    parts: tuple[int, ...] | None
    batched: bool = False

    @property
    def name(self) -> str:
        """In words, as messages and docs say it."""
        if self.parts is None:
            return "whole"
        return "halves" if len(self.parts) > 1 else f"part {self.parts[0] + 1} of a tuple"


class Proved(NamedTuple):
    """A decoder block of the loaded model and the form of its output."""

    block: nn.Module
    form: Form


class Refused(ValueError):
    """No form of the stream was proved; the message names the block and what was seen."""


class Passes:
    """The passes through one model: `base` is the plain one, and others are edited."""

    def __init__(self, model: nn.Module, blocks: Mapping[int, nn.Module], run: Callable[[], Any], hidden: int) -> None:
        self.model, self.blocks, self.run, self.hidden = model, blocks, run, hidden
        self.base = self.trace()
        self.generator = torch.Generator().manual_seed(13)

    def trace(self, edit: EditOutput | None = None, edit_inputs: EditInputs | None = None) -> Trace:
        """One more pass, edited or not."""
        return record(self.model, self.blocks, self.run, self.hidden, edit=edit, edit_inputs=edit_inputs)

    def noise(self, like: Tensor, scale: float) -> Tensor:
        """Signs times `scale`, equal in every process."""
        return signs(like, scale, self.generator)


def signs(like: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Signs times `scale`, equal in every process."""
    drawn = torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
    return (drawn.float() * scale).to(like.device, like.dtype)


def candidates(base: Trace, hidden: int) -> list[Form]:
    """The forms that the outputs of a pass allow: sums of two parts, then single ones. Raises Refused if one has none.

    Sums of more parts are none of them, since a steered block adds up two (`blocks.steered_class`).
    """
    parts: list[int] = []
    for layer, step in base.steps.items():
        shaped = shaped_parts(step, hidden)
        if not shaped:
            returned = step.returned if step.packed else step.returned[0]
            raise Refused(
                f"steer: {step.name} at layer {layer} returns {shape_of(returned)}, not one residual stream "
                f"[tokens, {hidden}]. To serve the model without the plugin, unset VLLM_PLUGINS"
            )
        parts += [part for part in shaped if part not in parts]
    if not any(step.packed for step in base.steps.values()):
        return [Form(None)]
    subsets = [c for n in (2, 1) for c in itertools.combinations(sorted(parts), n)]
    return [Form(subset) for subset in subsets]


def shaped_parts(step: Step, hidden: int) -> list[int]:
    """The parts of a block's output that are shaped like the stream."""
    return [i for i, part in enumerate(step.returned) if is_stream(part, hidden)]


def form_at(form: Form, step: Step, hidden: int) -> Form:
    """A form for the output of one block, which may lack a part (None): those that it has."""
    shaped = shaped_parts(step, hidden)
    batched = bool(shaped) and step.returned[shaped[0]].ndim == 3
    if form.parts is None or not step.packed:
        return Form(None, batched)
    return Form(tuple(part for part in form.parts if part in shaped), batched)


def parts_of(form: Form, step: Step, hidden: int) -> tuple[int, ...]:
    """The parts of a form in the output of one block; the first where that is a tensor."""
    return form_at(form, step, hidden).parts if step.packed else (0,)  # type: ignore[return-value]


def stream(form: Form, step: Step, values: list[Any], hidden: int) -> Tensor:
    """The stream of a form in what a block returned, float64 [tokens, hidden] on the CPU."""
    return total_of([values[part] for part in parts_of(form, step, hidden)])


def total_of(tensors: list[Tensor]) -> Tensor:
    """The sum of tensors that are shaped like the stream, float64 [tokens, hidden] on the CPU."""
    return torch.stack([tensor.reshape(-1, tensor.shape[-1]).double().cpu() for tensor in tensors]).sum(0)
