"""A proof that the outputs of a decoder's blocks are its residual stream, by intervention.

A vector is planted at the output of every block of a running model: what the next block takes must be the planted
output, bit for bit, and what follows the last block (the final norm) must take that block's. So a decoder that applies
a norm between its blocks, scales the stream, carries several streams, or adds the outputs up itself is refused, with
the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

IDS = ((1, 2, 3, 4), (1, 2, 3, 5))  # they differ in the last token, to show whether tokens see what follows them


def refusal(stack: nn.Module, blocks: Sequence[nn.Module], size: int) -> str | None:
    """Why the outputs of `blocks` are not the residual stream [batch, tokens, `size`] of the decoder `stack`, or None.

    It takes three passes over eight tokens. Nothing is raised for a model that can't be run in this way.
    """
    try:
        plain, planted = _run(stack, blocks, size, plant=False), _run(stack, blocks, size, plant=True)
        padding = _reads_padding(stack)
    except Exception as error:  # a model that can't be called this way may raise anything; it stays unproved
        reason = str(error).strip().splitlines()
        return f"it could not be run on token ids ({type(error).__name__}{': ' + reason[0] if reason else ''})"
    return (
        _shapes(plain, len(blocks), size) or _reads(plain, planted) or _reports(plain) or _looks_ahead(plain) or padding
    )


def output_of(output: Any) -> Tensor:
    """The residual stream [batch, tokens, hidden] in what a block returned: a tensor, or a tuple that it leads."""
    return output if isinstance(output, Tensor) else output[0]


class _Record:
    """What a pass showed: for each block its first input, its other inputs of the same shape, and its output."""

    def __init__(self) -> None:
        self.inputs: list[Tensor | None] = []
        self.others: list[list[Tensor]] = []
        self.outputs: list[Tensor] = []
        self.after: Tensor | None = None  # what the first module after the last block takes, or the decoder returns
        self.states: Sequence[Tensor] | None = None
        self.another: str | None = None  # the class of a block that is none of the claimed ones, and ran too


def _run(stack: nn.Module, blocks: Sequence[nn.Module], size: int, *, plant: bool) -> _Record:
    """One pass; with `plant`, a vector as long as its stream, or longer, is added to every token at every block."""
    record = _Record()
    ids = torch.tensor(IDS, device=next(stack.parameters()).device)

    def before(_block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        first, *others = [*args, *kwargs.values()] if args else _first("hidden_states", kwargs)
        record.inputs.append(first.clone() if isinstance(first, Tensor) else None)
        shape = (*ids.shape, size)
        record.others.append([t.clone() for t in others if isinstance(t, Tensor) and tuple(t.shape) == shape])

    def after(_block: nn.Module, _args: Any, output: Any) -> Any:
        states = output_of(output)
        if plant:
            generator = torch.Generator().manual_seed(len(record.outputs))
            planted = torch.randn(states.shape, generator=generator) * torch.linspace(1, 3, states.shape[-2])[:, None]
            states = states + (planted.to(states.device) * states.float().std()).to(states.dtype)
            output = states if isinstance(output, Tensor) else (states, *output[1:])
        record.outputs.append(states.clone())
        return output

    def outside(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if type(module) in kinds:
            record.another = type(module).__name__
        if record.after is None and len(record.outputs) == len(blocks):
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            record.after = next((t.clone() for t in tensors if t.shape == record.outputs[-1].shape), None)

    inside, kinds = {module for block in blocks for module in block.modules()}, set(map(type, blocks))
    with contextlib.ExitStack() as handles:
        for block in blocks:
            handles.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            handles.callback(block.register_forward_hook(after, prepend=True).remove)
        for module in stack.modules():
            if module is not stack and module not in inside:
                handles.callback(module.register_forward_pre_hook(outside, with_kwargs=True).remove)
        with torch.inference_mode(), _evaluating(stack):
            returned = stack(input_ids=ids, output_hidden_states=True, use_cache=False)
    record.states = getattr(returned, "hidden_states", None)
    if record.after is None:
        last = getattr(returned, "last_hidden_state", None)
        record.after = last if isinstance(last, Tensor) or not record.states else record.states[-1]
    return record


def _first(name: str, kwargs: dict[str, Any]) -> list[Any]:
    return [kwargs.get(name), *(value for key, value in kwargs.items() if key != name)]


@contextlib.contextmanager
def _evaluating(stack: nn.Module) -> Iterator[None]:
    """Within: without dropout, which would make two passes differ."""
    training = [module for module in stack.modules() if module.training]
    stack.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _shapes(plain: _Record, count: int, size: int) -> str | None:
    expected = (len(IDS), len(IDS[0]), size)
    if len(plain.outputs) != count:
        return f"its {count} blocks ran {len(plain.outputs)} times in a pass"
    if plain.another is not None:
        return f"another {plain.another} runs beside its {count} blocks"
    for i, output in enumerate(plain.outputs):
        if tuple(output.shape) != expected:
            return f"block {i} returns {list(output.shape)}, not one stream {list(expected)}"
    return None


def _reads(plain: _Record, planted: _Record) -> str | None:
    """Whether each block takes what the one before it returned, and nothing else that depends on outputs."""
    takers = [*planted.inputs[1:], planted.after]
    for i, (returned, taken) in enumerate(zip(planted.outputs, takers, strict=True)):
        name = f"block {i + 1}" if i + 1 < len(planted.outputs) else "what follows the last block"
        if taken is None or taken.shape != returned.shape:
            return f"{name} does not take what block {i} returned"
        if not torch.equal(taken, returned):
            return f"{name} takes {_relation(returned, taken)} what block {i} returned"
    for i, (before, now) in enumerate(zip(plain.others, planted.others, strict=True)):
        if len(before) != len(now) or not all(map(torch.equal, before, now)):
            return f"block {i} takes a second stream, which follows from the outputs of the blocks before it"
    return None


def _relation(returned: Tensor, taken: Tensor) -> str:
    """How one tensor follows from another, as far as it can be seen."""
    wide, other = returned.double().flatten(), taken.double().flatten()
    factor = float(wide @ other / (wide @ wide))
    if torch.allclose(other, factor * wide, rtol=1e-3, atol=1e-3 * float(other.abs().max())):
        return f"{factor:.3g} times"
    rms = taken.double().pow(2).mean(-1)
    if torch.allclose(rms, rms.flatten()[0].expand_as(rms), rtol=1e-2):
        return "a normalised form of"
    return "something else than"


def _reports(plain: _Record) -> str | None:
    """Whether the hidden states that the model reports are these outputs, if it reports any."""
    if plain.states is None:
        return None
    if len(plain.states) != len(plain.outputs) + 1:
        return f"it reports {len(plain.states)} hidden states for {len(plain.outputs)} blocks"
    if all(map(torch.equal, plain.states, plain.outputs)):
        return None  # Mamba's begin behind the first block, not with the embeddings
    for i, (state, output) in enumerate(zip(plain.states[1:-1], plain.outputs[:-1], strict=True)):
        if not torch.equal(state, output):
            return f"its hidden state {i + 1} is not what block {i} returned"
    return None


def _reads_padding(stack: nn.Module) -> str | None:
    """Whether tokens see what stands in the padding on their left: they must not, since batches are padded."""
    ids = torch.tensor(IDS, device=next(stack.parameters()).device)
    ids[1, 0] = 7
    ids[1, 1:] = ids[0, 1:]
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    with torch.inference_mode(), _evaluating(stack):
        returned = stack(input_ids=ids, attention_mask=mask, use_cache=False)
    states = getattr(returned, "last_hidden_state", None)
    if not isinstance(states, Tensor):
        return None
    tolerance = torch.finfo(states.dtype).eps ** 0.5 * float(states[:, 1:].abs().max())
    equal = torch.allclose(states[0, 1:], states[1, 1:], rtol=0, atol=tolerance)
    return None if equal else "tokens see the padding before them"


def _looks_ahead(plain: _Record) -> str | None:
    last = plain.outputs[-1]
    tolerance = torch.finfo(last.dtype).eps ** 0.5 * float(last.abs().max())
    if not torch.allclose(last[0, :-1], last[1, :-1], rtol=0, atol=tolerance):
        return "tokens see what follows them"
    return None
