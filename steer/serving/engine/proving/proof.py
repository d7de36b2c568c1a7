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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steer.serving.engine.proving.forms import (
    Form,
    Passes,
    Proved,
    Refused,
    candidates,
    form_at,
    parts_of,
    shaped_parts,
    stream,
    total_of,
)
from steer.serving.engine.proving.planting import outgoing, problem_of_consumption, problem_of_planting
from steer.serving.engine.proving.trace import Trace, record

MASSIVE = 30.0  # how many times a token's median magnitude makes a channel a massive activation
SAME = 1e-2  # how far the median token's stream may change where it should not, as a share of a block's contribution


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
                layer: Proved(block, form_at(form, passes.base.steps[layer], hidden)) for layer, block in blocks.items()
            }
        reasons.append(f"as {form.name}: {reason}")
    raise Refused(
        f"steer: it can't be proved where {type(model).__name__} has its residual stream: {'; '.join(reasons)}. "
        "To serve the model without the plugin, unset VLLM_PLUGINS"
    )


def problem_of(form: Form, passes: Passes) -> str | None:
    """Why a form is not where the blocks hold the stream; None if it is proved."""
    base, hidden = passes.base, passes.hidden
    packed = any(step.packed for step in base.steps.values())
    if packed != (form.parts is not None):
        return f"{base.steps[min(base.steps)].name} returns {'a tuple' if packed else 'one tensor'}"
    for part in form.parts or ():
        if not any(part in shaped_parts(step, hidden) for step in base.steps.values()):
            return f"no block returns a part {part + 1} that is shaped like the stream"
    for layer, step in base.steps.items():
        if not parts_of(form, step, hidden):
            return f"{step.name} at layer {layer} returns none of these parts"
        if not bool(stream(form, step, step.returned, hidden).isfinite().all()):
            return f"{step.name} at layer {layer} returns values that are not finite"
    return (
        _problem_of_tokens(form, base, hidden)
        or problem_of_consumption(form, base, hidden)
        or _problem_of_other_parts(form, passes)
        or _problem_of_halves(form, passes)
        or problem_of_planting(form, passes)
    )


def _problem_of_tokens(form: Form, trace: Trace, hidden: int) -> str | None:
    """Whether each block has the stream of all tokens, as the model's output: slots are found by a token's place."""
    outputs = [trace.output] if isinstance(trace.output, Tensor) else outgoing(trace.output, hidden)
    for layer, step in trace.steps.items():
        tokens = len(stream(form, step, step.returned, hidden))
        expected = [output.numel() // output.shape[-1] for output in outputs]
        if any(tokens != count for count in expected):
            return f"{step.name} at layer {layer} returns {tokens} tokens, and the model {expected[0]}"
    return None


def _problem_of_other_parts(form: Form, passes: Passes) -> str | None:
    """Whether something depends on a part that is not of the stream: such parts are replaced by noise."""
    hidden, touched = passes.hidden, False

    def edit(layer: int, parts: list[Any]) -> list[Any]:
        nonlocal touched
        step = passes.base.steps[layer]
        mine = parts_of(form, step, hidden)
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
        mine = parts_of(form, passes.base.steps[layer], hidden)
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
        a, b = (total_of([output]) for output in (base.output, other.output))
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
