"""Whether the next block takes what a block sends, and whether a planted vector leaves a block as it came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steer.serving.engine.proving.forms import Form, Passes, parts_of, signs, stream, total_of
from steer.serving.engine.proving.trace import Trace, is_stream

PLANTED = 1e3  # how many times the stream's root mean square a planted vector's is, where it does not overflow
SMALLER = 4.0  # how much smaller that of the other pass is, and each attempt after one that overflowed
ATTEMPTS = 8
FACTOR = 0.01  # how far from 1 the number may be by which a block multiplies the median token's planted vector
LINEAR = 0.03  # how far the median token's planted vector may turn on its way through a block, as a share of its length
LEAST_SCALE = 0.003  # by which a block of SCALED may multiply the stream: less is what a norm leaves

# Blocks that multiply the stream by a number, with tests that transformers' blocks do so too: the stream is the same.
SCALED = {"Gemma4DecoderLayer"}


def problem_of_consumption(form: Form, trace: Trace, hidden: int) -> str | None:
    """Whether each block takes, as it is, what the block before sent: its parts, or their sum."""
    layers = sorted(trace.steps)
    for layer in layers:
        step = trace.steps[layer]
        sent = [step.sent[part] for part in parts_of(form, step, hidden)]
        following = trace.steps.get(layer + 1) if layer != layers[-1] else trace.behind
        inputs = list(following.inputs.values()) if following is not None else outgoing(trace.output, hidden)
        if all(any(_equal(part, taken) for taken in inputs) for part in sent):
            continue
        total = total_of(sent)
        rounding = 4 * torch.finfo(sent[0].dtype).eps * total_of([part.abs() for part in sent])
        if len(sent) > 1 and any(_within(total, taken, rounding) for taken in inputs):
            continue
        taker = following.name if following is not None else "the output of the model"
        return f"{taker} does not take what {step.name} at layer {layer} returns as the stream"
    return None


def _within(total: Tensor, taken: Tensor, rounding: Tensor) -> bool:
    """Whether a sum of halves, computed somewhere else, is this one but for rounding, in every channel."""
    return taken.numel() == total.numel() and bool(((total - total_of([taken])).abs() <= rounding).all())


def outgoing(output: Any, hidden: int) -> list[Tensor]:
    """The streams that a model sends to the process which has the next layers; what it returns, where that is one."""
    tensors = getattr(output, "tensors", None)
    sent = list(tensors.values()) if isinstance(tensors, dict) else [output]
    return [value for value in sent if is_stream(value, hidden)]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def problem_of_planting(form: Form, passes: Passes) -> str | None:
    """Whether a planted vector arrives at the next block, and leaves it as it came."""
    streams = [stream(form, step, step.returned, passes.hidden) for step in passes.base.steps.values()]
    first = passes.base.steps[min(passes.base.steps)]
    largest = torch.finfo(first.returned[parts_of(form, first, passes.hidden)[0]].dtype).max
    scale = PLANTED * max(1e-6, *(float(each.pow(2).mean(1).sqrt().median()) for each in streams))
    size = min(scale, largest / 8)  # room for what attention and MLP add
    for _ in range(ATTEMPTS):
        large = _planted(form, passes, size)
        if large is None:
            size /= SMALLER
            continue
        problem = problem_of_consumption(form, large, passes.hidden)
        if problem is not None:
            return problem
        small = _planted(form, passes, size / SMALLER)
        return _problem_of_path(form, passes, large, small) if small else "a smaller planted vector overflows"
    return f"planted vectors overflow, also those of {size * SMALLER:.3g}"


def _planted(form: Form, passes: Passes, size: float) -> Trace | None:
    """A pass in which each block takes vectors of this size in the place of the stream; None if something overflows.

    They are the same ones in each pass, times `size`. Nothing of the stream is left beside them, so neither do they add
    up from block to block nor do massive activations, which a trained model adds to some streams, take the room that
    float16 has.
    """
    hidden, base = passes.hidden, passes.base
    generator = torch.Generator().manual_seed(29)

    def edit(layer: int, parts: list[Any]) -> list[Any]:
        first, *others = parts_of(form, base.steps[layer], hidden)
        parts[first] = signs(parts[first], size, generator)
        for part in others:
            parts[part] = torch.zeros_like(parts[part])
        return parts

    def edit_inputs(inputs: dict[str, Tensor]) -> Mapping[str, Tensor]:
        name = _entrance(form, base, hidden)
        return {name: signs(inputs[name], size, generator)} if name in inputs else {}

    trace = passes.trace(edit, edit_inputs)
    returned = [stream(form, step, step.returned, hidden) for step in trace.steps.values()]
    return trace if all(bool(each.isfinite().all()) for each in returned) else None


def _entrance(form: Form, base: Trace, hidden: int) -> str:
    """The parameter of the first block that takes the stream: that by which the next block takes it, or the first."""
    layers = sorted(base.steps)
    first = base.steps[layers[0]]
    if len(layers) > 1:
        part = first.sent[parts_of(form, first, hidden)[0]]
        for name, taken in base.steps[layers[1]].inputs.items():
            if _equal(part, taken) and name in first.inputs:
                return name
    return next(iter(first.inputs), "")


def _problem_of_path(form: Form, passes: Passes, large: Trace, small: Trace) -> str | None:
    """Whether the difference between what a block takes in two passes is that between what it returns in them.

    What attention and MLP add is nearly the same in both, however much it is: their inputs are normalised.
    """
    hidden, base = passes.hidden, passes.base
    layers = sorted(base.steps)
    for layer, before in zip(layers, [None, *layers], strict=False):
        step = base.steps[layer]
        if before is None:
            name = _entrance(form, base, hidden)
            if name not in step.inputs:
                return f"{step.name} at layer {layer} takes no stream [tokens, {hidden}]"
            taken = total_of([large.steps[layer].inputs[name]]) - total_of([small.steps[layer].inputs[name]])
        else:
            sent = (stream(form, base.steps[before], trace.steps[before].sent, hidden) for trace in (large, small))
            taken = next(sent) - next(sent)
        returned = (stream(form, step, trace.steps[layer].returned, hidden) for trace in (large, small))
        left = next(returned) - next(returned)
        factor = float(((left * taken).sum(1) / taken.pow(2).sum(1)).median())
        turned = float(((left - factor * taken).norm(dim=1) / left.norm(dim=1)).median())
        if abs(factor) < LEAST_SCALE or not turned < LINEAR:
            return f"what {step.name} takes at layer {layer} is not in what it returns as the stream"
        if abs(factor - 1) > FACTOR and step.name not in SCALED:
            return f"{step.name} at layer {layer} multiplies the stream by {factor:.3g}"
    return None
