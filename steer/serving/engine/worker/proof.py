"""The proof, when a model has been loaded, of where its blocks' outputs hold the residual stream.

Nothing is looked up by name: a form (the stream is the output, one part of it, or the sum of two) is accepted if passes
through the loaded model show that
- the next block, or the module behind the last one (the final norm), takes exactly these parts;
- the parts that do not belong to the stream may be anything: no later block and no output of the model changes;
- two halves may be exchanged: nothing changes, so later blocks depend on their sum;
- a vector planted in the place of the stream arrives at the next block as exactly that vector, and where it is so large
  that attention and MLP, whose inputs are normalised, no longer count, it leaves that block as it came: what planting
  four times as much changes about the output is just what it changes about the input. A stream that is scaled or
  normalised on the way fails here, and so does a block's contribution, or a half, taken for the stream.
So what is steered is what Hugging Face counts as `hidden_states[i + 1]`: the embeddings plus all contributions so far.

A model for which no form holds is refused: steering it would be a guess.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steer.serving.engine.worker.trace import EditInputs, EditOutput, Step, Trace, is_stream, record, shape_of

PLANTED = 1e3  # how many times the stream's root mean square a planted vector's is, where it does not overflow
SMALLER = 4.0  # how much smaller that of the other pass is, and each attempt after one that overflowed
ATTEMPTS = 8
FACTOR = 0.01  # how far from 1 the number may be by which a block multiplies the median token's planted vector
LINEAR = 0.03  # how far the median token's planted vector may turn on its way through a block, as a share of its length
LEAST_SCALE = 0.003  # by which a block of SCALED may multiply the stream: less is what a norm leaves
MASSIVE = 30.0  # how many times a token's median magnitude makes a channel a massive activation
SAME = 1e-2  # how far the median token's stream may change where it should not, as a share of a block's contribution

# Blocks that multiply the stream by a number, with tests that transformers' blocks do so too: the stream is the same.
SCALED = {"Gemma4DecoderLayer"}


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


def decoder_blocks(model: nn.Module, count: int, run: Callable[[], Any], hidden: int) -> dict[int, nn.Module]:
    """The decoder blocks in this process, by layer: of the one list of `count` blocks that a pass calls one by one.

    With pipeline parallelism the blocks of other processes are placeholders. Raises Refused.
    """
    lists: list[dict[int, nn.Module]] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            local = {i: block for i, block in enumerate(module) if not isinstance(block, nn.Identity)}
            parts = [set(map(id, other.values())) for other in lists]
            if local and set(map(id, local.values())) not in parts:
                lists.append(local)
    inside = {id(part) for local in lists for block in local.values() for part in block.modules() if part is not block}
    lists = [local for local in lists if not any(id(block) in inside for block in local.values())]
    called = [(local, record(model, local, run, hidden)) for local in lists]
    fitting = [local for local, trace in called if trace.order == sorted(local)]
    if len(fitting) != 1:
        names = [", ".join(dict.fromkeys(step.name for step in trace.steps.values())) for _, trace in called]
        seen = [f"{name}: called in the order {_some(t)}" for name, (_, t) in zip(names, called, strict=True)]
        found = "; ".join(seen) if seen else f"no list of {count} modules"
        raise Refused(
            f"steer: {type(model).__name__} has {len(fitting)} lists of {count} decoder blocks that a pass calls one "
            f"after the other, not one ({found}). To serve the model without the plugin, unset VLLM_PLUGINS"
        )
    return fitting[0]


def _some(trace: Trace) -> str:
    order = ", ".join(map(str, trace.order[:12])) + (", …" if len(trace.order) > 12 else "")
    return order or "none"


def prove(model: nn.Module, count: int, hidden: int, run: Callable[[], Any]) -> dict[int, Proved]:
    """The decoder blocks in this process by layer, each with its proved form.

    `run` makes one pass through the model, with the same tokens each time; `count` is the model's number of layers,
    `hidden` the size of its stream. Raises Refused.
    """
    blocks = decoder_blocks(model, count, run, hidden)
    passes = Passes(model, blocks, run, hidden)
    forms = candidates(passes.base, hidden)
    reasons = []
    for form in forms:
        reason = problem_of(form, passes)
        if reason is None:
            return {
                layer: Proved(block, _form_at(form, passes.base.steps[layer], hidden))
                for layer, block in blocks.items()
            }
        reasons.append(f"as {form.name}: {reason}")
    raise Refused(
        f"steer: it can't be proved where {type(model).__name__} has its residual stream: {'; '.join(reasons)}. "
        "To serve the model without the plugin, unset VLLM_PLUGINS"
    )


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
        return _signs(like, scale, self.generator)


def candidates(base: Trace, hidden: int) -> list[Form]:
    """The forms that the outputs of a pass allow, the sum of all parts first. Raises Refused where one has none."""
    parts: list[int] = []
    for layer, step in base.steps.items():
        shaped = _shaped(step, hidden)
        if not shaped:
            returned = step.returned if step.packed else step.returned[0]
            raise Refused(
                f"steer: {step.name} at layer {layer} returns {shape_of(returned)}, not one residual stream "
                f"[tokens, {hidden}]. To serve the model without the plugin, unset VLLM_PLUGINS"
            )
        parts += [part for part in shaped if part not in parts]
    if not any(step.packed for step in base.steps.values()):
        return [Form(None)]
    subsets = [c for n in range(len(parts), 0, -1) for c in itertools.combinations(sorted(parts), n)]
    return [Form(subset) for subset in subsets]


def _shaped(step: Step, hidden: int) -> list[int]:
    """The parts of a block's output that are shaped like the stream."""
    return [i for i, part in enumerate(step.returned) if is_stream(part, hidden)]


def _form_at(form: Form, step: Step, hidden: int) -> Form:
    """A form for the output of one block, which may lack a part (None): those that it has."""
    shaped = _shaped(step, hidden)
    batched = bool(shaped) and step.returned[shaped[0]].ndim == 3
    if form.parts is None or not step.packed:
        return Form(None, batched)
    return Form(tuple(part for part in form.parts if part in shaped), batched)


def _parts(form: Form, step: Step, hidden: int) -> tuple[int, ...]:
    return _form_at(form, step, hidden).parts if step.packed else (0,)  # type: ignore[return-value]


def stream(form: Form, step: Step, values: list[Any], hidden: int) -> Tensor:
    """The stream of a form in what a block returned, float64 [tokens, hidden] on the CPU."""
    return _sum([values[part] for part in _parts(form, step, hidden)])


def _sum(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.reshape(-1, tensor.shape[-1]).double().cpu() for tensor in tensors]).sum(0)


def problem_of(form: Form, passes: Passes) -> str | None:
    """Why a form is not where the blocks hold the stream; None if it is proved."""
    base, hidden = passes.base, passes.hidden
    packed = any(step.packed for step in base.steps.values())
    if packed != (form.parts is not None):
        return f"{base.steps[min(base.steps)].name} returns {'a tuple' if packed else 'one tensor'}"
    for part in form.parts or ():
        if not any(part in _shaped(step, hidden) for step in base.steps.values()):
            return f"no block returns a part {part + 1} that is shaped like the stream"
    for layer, step in base.steps.items():
        if not _parts(form, step, hidden):
            return f"{step.name} at layer {layer} returns none of these parts"
        if not bool(stream(form, step, step.returned, hidden).isfinite().all()):
            return f"{step.name} at layer {layer} returns values that are not finite"
    return (
        _problem_of_tokens(form, base, hidden)
        or _problem_of_consumption(form, base, hidden)
        or _problem_of_other_parts(form, passes)
        or _problem_of_halves(form, passes)
        or _problem_of_planting(form, passes)
    )


def _problem_of_tokens(form: Form, trace: Trace, hidden: int) -> str | None:
    """Whether each block has the stream of all tokens, as the model's output: slots are found by a token's place."""
    outputs = [trace.output] if isinstance(trace.output, Tensor) else _outgoing(trace.output, hidden)
    for layer, step in trace.steps.items():
        tokens = len(stream(form, step, step.returned, hidden))
        expected = [output.numel() // output.shape[-1] for output in outputs]
        if any(tokens != count for count in expected):
            return f"{step.name} at layer {layer} returns {tokens} tokens, and the model {expected[0]}"
    return None


def _problem_of_consumption(form: Form, trace: Trace, hidden: int) -> str | None:
    """Whether each block takes, as it is, what the block before sent: its parts, or their sum."""
    layers = sorted(trace.steps)
    for layer in layers:
        step = trace.steps[layer]
        sent = [step.sent[part] for part in _parts(form, step, hidden)]
        following = trace.steps.get(layer + 1) if layer != layers[-1] else trace.behind
        inputs = list(following.inputs.values()) if following is not None else _outgoing(trace.output, hidden)
        if all(any(_equal(part, taken) for taken in inputs) for part in sent):
            continue
        total = _sum(sent)
        rounding = 4 * torch.finfo(sent[0].dtype).eps * _sum([part.abs() for part in sent])
        if len(sent) > 1 and any(_within(total, taken, rounding) for taken in inputs):
            continue
        taker = following.name if following is not None else f"the output of {type(trace.output).__name__}"
        return f"{taker} does not take what {step.name} at layer {layer} returns as the stream"
    return None


def _within(total: Tensor, taken: Tensor, rounding: Tensor) -> bool:
    """Whether a sum of halves, computed somewhere else, is this one but for rounding, in every channel."""
    return taken.numel() == total.numel() and bool(((total - _sum([taken])).abs() <= rounding).all())


def _outgoing(output: Any, hidden: int) -> list[Tensor]:
    """The streams that a model sends to the process which has the next layers, or none."""
    tensors = getattr(output, "tensors", None)
    return [value for value in tensors.values() if is_stream(value, hidden)] if isinstance(tensors, dict) else []


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def _problem_of_other_parts(form: Form, passes: Passes) -> str | None:
    """Whether something depends on a part that is not of the stream: such parts are replaced by noise."""
    hidden, touched = passes.hidden, False

    def edit(layer: int, parts: list[Any]) -> list[Any]:
        nonlocal touched
        step = passes.base.steps[layer]
        mine = _parts(form, step, hidden)
        scale = float(stream(form, step, step.returned, hidden).pow(2).mean().sqrt())
        for i, part in enumerate(parts):
            if i not in mine and isinstance(part, Tensor) and part.is_floating_point():
                parts[i], touched = passes.noise(part, scale or 1.0), True
        return parts

    trace = passes.trace(edit)
    changed = _changed(form, passes.base, trace, hidden) if touched else None
    return changed and f"{changed} depends on another part of what the block before returns"


def _problem_of_halves(form: Form, passes: Passes) -> str | None:
    """Whether something depends on the halves other than by their sum: each takes the place of the next."""
    hidden = passes.hidden
    if form.parts is None or len(form.parts) == 1:
        return None

    def edit(layer: int, parts: list[Any]) -> list[Any]:
        mine = _parts(form, passes.base.steps[layer], hidden)
        turned = [parts[part].clone() for part in (*mine[1:], mine[0])]
        for part, value in zip(mine, turned, strict=True):
            parts[part] = value
        return parts

    changed = _changed(form, passes.base, passes.trace(edit), hidden)
    return changed and f"{changed} depends on the parts of what the block before returns other than by their sum"


def _changed(form: Form, base: Trace, other: Trace, hidden: int) -> str | None:
    """The first block whose stream, or the model where its output, differs between two passes; None if nothing does."""
    last = None
    for layer, step in base.steps.items():
        before, after = (stream(form, t.steps[layer], t.steps[layer].returned, hidden) for t in (base, other))
        if _differ(before, after, before if last is None else before - last, step.returned):
            return f"{step.name} at layer {layer}"
        last = before
    if isinstance(base.output, Tensor) and isinstance(other.output, Tensor):
        a, b = (_sum([output]) for output in (base.output, other.output))
        if _differ(a, b, a, [base.output]):
            return "the output of the model"
    return None


def _differ(a: Tensor, b: Tensor, contribution: Tensor, like: list[Any]) -> bool:
    """Whether two streams [tokens, hidden] differ by more than rounding and a share of what the block contributes.

    Channels of massive activations are left out: beside them, in bfloat16, rounding would hide every difference.
    """
    eps = torch.finfo(next(part.dtype for part in like if isinstance(part, Tensor))).eps
    usual = a.abs().median(dim=1, keepdim=True).values
    common = ((a.abs() <= MASSIVE * usual) | (usual == 0)).double()
    difference, whole, contributed = ((each * common).norm(dim=1) for each in (a - b, a, contribution))
    return not bool((difference - SAME * contributed - 8 * eps * whole).median() <= 0)


def _problem_of_planting(form: Form, passes: Passes) -> str | None:
    """Whether a planted vector arrives at the next block, and leaves it as it came."""
    streams = [stream(form, step, step.returned, passes.hidden) for step in passes.base.steps.values()]
    first = passes.base.steps[min(passes.base.steps)]
    largest = torch.finfo(first.returned[_parts(form, first, passes.hidden)[0]].dtype).max
    scale = PLANTED * max(1e-6, *(float(each.pow(2).mean(1).sqrt().median()) for each in streams))
    size = min(scale, largest / 8)  # room for what attention and MLP add
    for _ in range(ATTEMPTS):
        large = _planted(form, passes, size)
        if large is None:
            size /= SMALLER
            continue
        problem = _problem_of_consumption(form, large, passes.hidden)
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
        first, *others = _parts(form, base.steps[layer], hidden)
        parts[first] = _signs(parts[first], size, generator)
        for part in others:
            parts[part] = torch.zeros_like(parts[part])
        return parts

    def edit_inputs(inputs: dict[str, Tensor]) -> Mapping[str, Tensor]:
        name = _entrance(form, base, hidden)
        return {name: _signs(inputs[name], size, generator)} if name in inputs else {}

    trace = passes.trace(edit, edit_inputs)
    returned = [stream(form, step, step.returned, hidden) for step in trace.steps.values()]
    return trace if all(bool(each.isfinite().all()) for each in returned) else None


def _signs(like: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Signs times `scale`, equal in every process."""
    signs = torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
    return (signs.float() * scale).to(like.device, like.dtype)


def _entrance(form: Form, base: Trace, hidden: int) -> str:
    """The parameter of the first block that takes the stream: that by which the next block takes it, or the first."""
    layers = sorted(base.steps)
    first = base.steps[layers[0]]
    if len(layers) > 1:
        part = first.sent[_parts(form, first, hidden)[0]]
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
            taken = _sum([large.steps[layer].inputs[name]]) - _sum([small.steps[layer].inputs[name]])
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
