"""A pass through a loaded model, recorded: what each decoder block takes and returns, and what takes the last output.

The pass can be edited: what a block returns, and what the first block takes. The recorded tensors are copies, since
vLLM's kernels add in place.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What a block returned, as a list, to what it returns instead; and the first block's inputs by name, likewise.
EditOutput = Callable[[int, list[Any]], list[Any]]
EditInputs = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


@dataclass
class Step:
    """One block of a pass, or the module behind the last one; tensors are copies.

    `inputs` by parameter, only those shaped like the stream; `returned` and `sent` (after the edit) are what the block
    returned, as a list of one where that is a tensor.
    """

    name: str
    inputs: dict[str, Tensor] = field(default_factory=dict)
    returned: list[Any] = field(default_factory=list)
    sent: list[Any] = field(default_factory=list)
    packed: bool = False  # whether it returned a tuple
    calls: int = 0


@dataclass
class Trace:
    """A pass: `steps` by layer, `order` in which layers ran, `behind` what took the last output, `output` the model's.

    Where the model goes on in another process, `output` is what it sends there and `behind` is None.
    """

    steps: dict[int, Step]
    order: list[int] = field(default_factory=list)
    behind: Step | None = None
    output: Any = None


def record(
    model: nn.Module,
    blocks: Mapping[int, nn.Module],
    run: Callable[[], Any],
    hidden: int,
    *,
    edit: EditOutput | None = None,
    edit_inputs: EditInputs | None = None,
) -> Trace:
    """Run the model once by `run`, which returns the model's output, and record it. `hidden` is the stream's size.

    Raises what `run` raises. Afterwards the modules are as they were.
    """
    trace = Trace({layer: Step(type(block).__name__) for layer, block in blocks.items()})
    first, last = min(blocks), max(blocks)
    inside = {id(module) for block in blocks.values() for module in block.modules()}
    outside = [m for m in model.modules() if id(m) not in inside and m is not model]

    def around_block(layer: int, forward: Callable[..., Any], names: inspect.Signature) -> Callable[..., Any]:
        def around(*args: Any, **kwargs: Any) -> Any:
            step = trace.steps[layer]
            step.calls += 1
            trace.order.append(layer)
            bound = names.bind(*args, **kwargs)
            inputs = _streams(bound.arguments, hidden)
            if edit_inputs is not None and layer == first:
                edited = edit_inputs({name: tensor.clone() for name, tensor in inputs.items()})
                for name, tensor in edited.items():
                    _set_argument(bound.arguments, name, tensor)
                inputs = {**inputs, **edited}
            step.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            output = forward(*bound.args, **bound.kwargs)
            step.packed = isinstance(output, tuple)
            parts = list(output) if isinstance(output, tuple) else [output]
            step.returned = [_copy(part) for part in parts]
            if edit is not None:
                parts = edit(layer, parts)
            step.sent = [_copy(part) for part in parts]
            return tuple(parts) if step.packed else parts[0]

        return around

    def around_other(module: nn.Module, forward: Callable[..., Any], names: inspect.Signature) -> Callable[..., Any]:
        def around(*args: Any, **kwargs: Any) -> Any:
            if trace.behind is None and trace.order and trace.order[-1] == last and trace.steps[last].sent:
                inputs = _streams(names.bind(*args, **kwargs).arguments, hidden)
                if inputs:
                    copies = {name: tensor.clone() for name, tensor in inputs.items()}
                    trace.behind = Step(type(module).__name__, copies)
            return forward(*args, **kwargs)

        return around

    with contextlib.ExitStack() as undo:
        for layer, block in blocks.items():
            undo.enter_context(_replaced(block, around_block(layer, block.forward, inspect.signature(block.forward))))
        for module in outside:
            try:
                names = inspect.signature(module.forward)
            except (TypeError, ValueError):  # not a Python function
                continue
            undo.enter_context(_replaced(module, around_other(module, module.forward, names)))
        undo.enter_context(_EmptyIsZero())
        undo.enter_context(torch.inference_mode())
        output = run()
    trace.output = output
    return trace


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A context in which this one module has another forward, whichever way it is called."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


class _EmptyIsZero(TorchFunctionMode):
    """New tensors are zero: in a pass without a cache, attention may leave its output unwritten."""

    zeros = {torch.empty: torch.zeros, torch.empty_like: torch.zeros_like, Tensor.new_empty: Tensor.new_zeros}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.zeros.get(function, function)(*args, **(kwargs or {}))


def is_stream(value: Any, hidden: int) -> bool:
    """Whether a value is shaped like the stream of a step: [tokens, hidden], or [1, tokens, hidden]."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.shape[-1:] == (hidden,)
        and (value.ndim == 2 or (value.ndim == 3 and value.shape[0] == 1))
    )


def shape_of(value: Any) -> str:
    """What a block returned, for a message: the shapes of its tensors."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"({', '.join(map(shape_of, value))})"
    return type(value).__name__ if value is not None else "None"


def _streams(arguments: Mapping[str, Any], hidden: int) -> dict[str, Tensor]:
    """Those of a call's arguments that are shaped like the stream, by parameter; those of *args by number."""
    streams = {}
    for name, value in arguments.items():
        if is_stream(value, hidden):
            streams[name] = value
        elif isinstance(value, tuple | list):
            streams |= {f"{name}[{i}]": part for i, part in enumerate(value) if is_stream(part, hidden)}
        elif isinstance(value, dict):
            streams |= {key: part for key, part in value.items() if is_stream(part, hidden)}
    return streams


def _set_argument(arguments: dict[str, Any], name: str, tensor: Tensor) -> None:
    """Replace an argument that `_streams` has named."""
    collection, bracket, number = name.partition("[")
    if bracket:
        values = arguments[collection]
        i = int(number.rstrip("]"))
        arguments[collection] = type(values)([*values[:i], tensor, *values[i + 1 :]])
    elif name in arguments:
        arguments[name] = tensor
    else:  # one of **kwargs
        next(value for value in arguments.values() if isinstance(value, dict) and name in value)[name] = tensor


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
