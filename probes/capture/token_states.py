"""The residual stream of single tokens at a few layers, for statistics over tokens (a covariance, a mean norm)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probes.models import residual
from probes.models.completions import Completion


def token_states(model: nn.Module, completions: Sequence[Completion], layers: Sequence[int]) -> dict[int, Tensor]:
    """The residual stream after every token of the completions, float32 [tokens, hidden] on the CPU, by layer.

    Prompts do not count, and neither does the first token of a sequence.
    """
    blocks = residual.blocks(model)
    device = next(model.parameters()).device
    collected: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    start = 0

    def hook(layer: int) -> Callable[..., None]:
        def collect(_block: nn.Module, _inputs: Any, output: Any) -> None:
            collected[layer].append(residual.output_of(output)[0, start:].float().cpu())

        return collect

    with contextlib.ExitStack() as handles, torch.inference_mode():
        for layer in collected:
            handles.callback(blocks[layer].register_forward_hook(hook(layer)).remove)
        for completion in completions:
            start = max(1, completion.prompt_length)
            model(input_ids=torch.tensor([completion.ids], device=device), use_cache=False, logits_to_keep=1)
    return {layer: torch.cat(states).clone() for layer, states in collected.items()}
