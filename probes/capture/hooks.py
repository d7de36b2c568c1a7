"""Hooks that receive the residual stream at chosen layers, and end the forward pass after the last of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from probes.models import residual

Receive = Callable[[int, Tensor], None]


class _LastLayerDone(Exception):
    """Raised by the hook of the last requested layer, to skip the layers above it."""


@contextlib.contextmanager
def block_outputs(model: nn.Module, layers: Sequence[int], receive: Receive) -> Iterator[None]:
    """A context in which `run` calls `receive(position, states)` for each of `layers`, then stops the pass.

    `position` is the layer's index in `layers`, `states` [batch, tokens, hidden] the output of its block.
    """
    stack_blocks = residual.blocks(model)
    last = max(layers)

    def hook(position: int, layer: int) -> Callable[..., None]:
        def call(_module: nn.Module, _inputs: Any, output: Any) -> None:
            receive(position, residual.output_of(output))
            if layer == last:
                raise _LastLayerDone

        return call

    handles = [stack_blocks[i].register_forward_hook(hook(p, i)) for p, i in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(stack: nn.Module, **inputs: Any) -> Any:
    """The output of a forward pass of the stack of blocks; None where it ends at the last layer that `block_outputs`
    receives."""
    with contextlib.suppress(_LastLayerDone):
        return stack(**inputs)
    return None
