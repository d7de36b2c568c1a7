"""The residual stream at every token of texts, handed on text by text: nothing is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probes.capture.activations import BATCH, length_changes_positions
from probes.capture.hooks import block_outputs, run
from probes.models import residual
from probes.models.tokens import Tokens
from vectors.errors import ModelError
from vectors.events import Event, OnEvent, ignore

# Called with the index of a text, the position of a layer in the list of layers, and states [tokens, size], float32.
Receive = Callable[[int, int, Tensor], None]


def token_states(
    model: nn.Module,
    texts: Sequence[Tokens],
    layers: Sequence[int],
    receive: Receive,
    *,
    batch: int = BATCH,
    on_event: OnEvent = ignore,
) -> None:
    """Call `receive` with the residual stream of every text at each of `layers`, on the model's device.

    Texts of like length run in right-padded batches of `batch`, chosen by their content, so that their order has no
    influence. Raises ModelError for a token that counts whose activation is not finite.
    """
    config = residual.text_config(model)
    pad = getattr(config, "pad_token_id", None) or 0
    stack, device = residual.decoder(model), next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i].ids), texts[i].ids))
    size = 1 if not order or length_changes_positions(config, len(texts[order[-1]].ids)) else batch
    done = 0
    with torch.inference_mode():
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            inputs = {name: value.to(device) for name, value in padded([texts[i].ids for i in indices], pad).items()}

            def pass_on(position: int, states: Tensor, indices: list[int] = indices) -> None:
                for row, index in enumerate(indices):
                    text = texts[index]
                    found = states[row, : len(text.ids)].float()
                    require_finite(found, text, layers[position], index)
                    receive(index, position, found)

            with block_outputs(model, layers, pass_on):
                run(stack, use_cache=False, **inputs)
            done += len(indices)
            on_event(Event("measuring activations", done, len(texts), "texts"))


def padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """Sequences as one batch, padded on the right, which causal models do not see: ids and mask [rows, longest]."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def require_finite(states: Tensor, text: Tokens, layer: int, index: int) -> None:
    """Refuse activations [tokens, size] that are not finite at a token that counts. Raises ModelError."""
    if not bool(torch.isfinite(states[text.counted]).all()):
        raise ModelError(
            f"layer {layer} is not finite for {text.origin or f'text {index + 1}'}",
            "use --dtype float32, or leave that text out",
        )
