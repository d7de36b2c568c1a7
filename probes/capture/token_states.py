"""The residual stream of single tokens at a few layers, for statistics over tokens (a covariance, a mean norm)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from probes.capture.hooks import block_outputs, run
from probes.models import residual
from probes.models.completions import Completion


def token_states(model: nn.Module, completions: Sequence[Completion], layers: Sequence[int]) -> dict[int, Tensor]:
    """The residual stream after every token of the completions, float32 [tokens, hidden] on the CPU, by layer.

    Prompts do not count, and neither does the first token of a sequence.
    """
    device = next(model.parameters()).device
    wanted = list(dict.fromkeys(layers))
    collected: list[list[Tensor]] = [[] for _ in wanted]
    start = 0

    def receive(position: int, states: Tensor) -> None:
        collected[position].append(states[0, start:].float().cpu())

    with block_outputs(model, wanted, receive), torch.inference_mode():
        for completion in completions:
            start = max(1, completion.prompt_length)
            ids = torch.tensor([completion.ids], device=device)
            run(residual.decoder(model), input_ids=ids, use_cache=False)
    return {layer: torch.cat(states).clone() for layer, states in zip(wanted, collected, strict=True)}
