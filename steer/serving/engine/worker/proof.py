"""The proof, when a model has been loaded, of where its blocks' outputs hold the residual stream.

Nothing is looked up by name: a form (the stream is the output, one part of it, or the sum of two) is accepted if passes
through the loaded model show that
- the next block, or the module behind the last one (the final norm), takes exactly these parts;
- the parts that do not belong to the stream may be anything: no later block and no output of the model changes;
- two halves may be exchanged: nothing changes, so later blocks depend on their sum;
- a vector planted in the output arrives at the next block as exactly that vector, and where it is so large that
  attention and MLP, whose inputs are normalised, no longer count, it leaves that block as it came. A stream that is
  scaled or normalised on the way fails here, and so does a block's contribution, or a half, taken for the stream.
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

# How many times the stream's root mean square a planted vector's is: the first at which nothing overflows.
PLANTED = (1e3, 100.0, 30.0, 10.0)
LINEAR = 0.1  # how far the median token's planted vector may turn on its way through a block, as a share of its length
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
        signs = torch.randint(0, 2, like.shape, generator=self.generator) * 2 - 1
        return (signs.float() * scale).to(like.device, like.dtype)


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
        _problem_of_consumption(form, base, hidden)
        or _problem_of_other_parts(form, passes)
        or _problem_of_halves(form, passes)
        or _problem_of_planting(form, passes)
    )


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
        rounding = 4 * torch.finfo(sent[0].dtype).eps * float(total.abs().max())
        if len(sent) > 1 and any(bool(((total - _sum([taken])).abs() <= rounding).all()) for taken in inputs):
            continue
        taker = following.name if following is not None else f"the output of {type(trace.output).__name__}"
        return f"{taker} does not take what {step.name} at layer {layer} returns as the stream"
    return None


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
    eps = torch.finfo(next(part.dtype for part in like if isinstance(part, Tensor))).eps
    allowed = SAME * contribution.norm(dim=1) + 8 * eps * a.norm(dim=1)
    return not bool(((a - b).norm(dim=1) - allowed).median() <= 0)


def _problem_of_planting(form: Form, passes: Passes) -> str | None:
    """Whether a planted vector arrives at the next block, and leaves it as it came."""
    problem = None
    for size in PLANTED:
        planted = _planted(form, passes, size)
        if planted is None:
            continue  # an overflow: a smaller vector may do
        problem = _problem_of_consumption(form, planted, passes.hidden) or _problem_of_path(form, passes, planted)
        return problem
    return "planted vectors overflow"


def _planted(form: Form, passes: Passes, size: float) -> Trace | None:
    """A pass with a large vector added to the first block's input, and small ones to each output; None if it overflows.

    The large one reaches every block along the stream, and does not add up with others.
    """
    hidden, base = passes.hidden, passes.base
    streams = [stream(form, step, step.returned, hidden) for step in base.steps.values()]
    scale = size * max(1e-6, *(float(each.pow(2).mean(1).sqrt().median()) for each in streams))
    first = base.steps[min(base.steps)]
    limit = torch.finfo(first.returned[_parts(form, first, hidden)[0]].dtype).max / 2
    if scale + max(float(each.abs().max()) for each in streams) > limit:
        return None

    def edit(layer: int, parts: list[Any]) -> list[Any]:
        part = _parts(form, base.steps[layer], hidden)[0]
        parts[part] = parts[part] + passes.noise(parts[part], scale / 100)
        return parts

    def edit_inputs(inputs: dict[str, Tensor]) -> Mapping[str, Tensor]:
        name = _entrance(form, base, hidden)
        return {name: inputs[name] + passes.noise(inputs[name], scale)} if name in inputs else {}

    trace = passes.trace(edit, edit_inputs)
    planted = [stream(form, step, step.returned, hidden) for step in trace.steps.values()]
    return trace if all(bool(each.isfinite().all()) for each in planted) else None


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


def _problem_of_path(form: Form, passes: Passes, planted: Trace) -> str | None:
    """Whether the difference that planting makes to what a block takes is the difference to what it returns."""
    hidden, base = passes.hidden, passes.base
    layers = sorted(base.steps)
    for layer, before in zip(layers, [None, *layers], strict=False):
        step, other = base.steps[layer], planted.steps[layer]
        if before is None:
            name = _entrance(form, base, hidden)
            if name not in step.inputs:
                return f"{step.name} at layer {layer} takes no stream [tokens, {hidden}]"
            taken = _sum([other.inputs[name]]) - _sum([step.inputs[name]])
        else:
            taken = stream(form, base.steps[before], planted.steps[before].sent, hidden)
            taken = taken - stream(form, base.steps[before], base.steps[before].sent, hidden)
        left = stream(form, step, other.returned, hidden) - stream(form, step, step.returned, hidden)
        factor = float(((left * taken).sum(1) / taken.pow(2).sum(1)).median())
        turned = float(((left - factor * taken).norm(dim=1) / taken.norm(dim=1)).median())
        if abs(factor) < LINEAR or not turned < LINEAR:
            return f"what {step.name} takes at layer {layer} is not in what it returns as the stream"
        if abs(factor - 1) > LINEAR and step.name not in SCALED:
            return f"{step.name} at layer {layer} multiplies the stream by {factor:.3g}"
    return None
