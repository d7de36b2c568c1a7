"""Linear layers of a float32 model on an x86 processor through oneDNN, with weights reordered into its blocks.

PyTorch sends a float32 linear layer to MKL, which reorders the weights at every call. oneDNN multiplies weights that
were reordered once, and costs an AMD EPYC (Zen 4, one thread, smollm2's sizes) 5 to 15 % less time for the 1,000 rows
of a scoring pass, 25 to 35 % for its output head, and 20 to 60 % for the 4 to 64 rows of a step of generation. Results
differ by rounding: the order of the sums is another. (`tests/bench/sweep.py` measures it.)
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

MOST = 2 * 2**30  # bytes of weights that are reordered: the originals stay in memory beside them


@contextlib.contextmanager
def packed_linear(model: nn.Module) -> Iterator[None]:
    """A context in which the model's linear layers multiply reordered copies of their weights where that is possible.

    Copies are made on entry, so the weights must not change inside; an inner context for the same model does nothing.
    Passes that build a graph for gradients, other dtypes and subclasses of `nn.Linear` run as they would without it.
    """
    layers = _packable(model)
    # All copies first: where memory does not suffice for one of them, the model stays as it was.
    forwards = [_forward(layer) for layer in layers]
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.__dict__["forward"] = forward
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _packable(model: nn.Module) -> list[nn.Linear]:
    if not (torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")):
        return []
    layers = [
        module
        for module in model.modules()
        # What something else computes instead (an inner context, offloaded weights) stays as it is.
        if type(module) is nn.Linear and "forward" not in module.__dict__ and "weight" in module._parameters
    ]
    layers = [each for each in layers if each.weight.device.type == "cpu" and each.weight.dtype == torch.float32]
    return layers if sum(4 * each.weight.numel() for each in layers) <= MOST else []


def _forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    with torch.inference_mode():
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
    bias = None if layer.bias is None else layer.bias.detach()
    multiply = torch.ops.mkldnn._linear_pointwise

    def forward(rows: Tensor) -> Tensor:
        if torch.is_grad_enabled() or rows.dtype != torch.float32 or not rows.numel():
            return nn.Linear.forward(layer, rows)
        result: Tensor = multiply(rows, weight, bias, "none", [], "")
        return result

    return forward
