"""What readouts say of texts: the score h w + b of every token, and one score for each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from probes.capture.activations import BATCH
from probes.capture.states import token_states
from probes.models.tokens import Tokens
from vectors.errors import UsageError
from vectors.events import OnEvent, ignore
from vectors.probe import Readout

Pool = Literal["mean", "max", "last"]
POOLS: tuple[Pool, ...] = get_args(Pool)


def token_scores(
    model: nn.Module,
    texts: Sequence[Tokens],
    readouts: Mapping[int, Readout],
    *,
    batch: int = BATCH,
    on_event: OnEvent = ignore,
) -> list[Tensor]:
    """The scores of every token of each text by the readout of each layer, float32 [tokens, layers] on the CPU.

    The columns are in the order of `readouts`. Tokens that do not count have a score too. Raises ModelError.
    """
    layers = list(readouts)
    device = next(model.parameters()).device
    moved = [Readout(readouts[layer].weight.to(device), readouts[layer].bias) for layer in layers]
    scores = [torch.empty(len(text.ids), len(layers)) for text in texts]

    def score(index: int, position: int, states: Tensor) -> None:
        scores[index][:, position] = moved[position].scores(states).cpu()

    token_states(model, texts, layers, score, batch=batch, on_event=on_event)
    return scores


def pooled(scores: Tensor, counted: Sequence[int], pool: Pool) -> Tensor:
    """One score for a text, from those of its tokens [tokens, ...] that count: their mean, the greatest or the last.

    The mean is the score of the mean activation, since a readout is linear.
    """
    chosen = scores[list(counted)]
    if pool == "mean":
        return chosen.mean(0)
    if pool == "max":
        return chosen.amax(0)
    if pool == "last":
        return chosen[-1]
    raise UsageError(f"there is no pooling {pool!r}", f"use {', '.join(POOLS)}")


def text_scores(
    model: nn.Module,
    texts: Sequence[Tokens],
    readouts: Mapping[int, Readout],
    *,
    pool: Pool = "mean",
    batch: int = BATCH,
    on_event: OnEvent = ignore,
) -> Tensor:
    """The score of each text by the readout of each layer, float32 [texts, layers]. Raises ModelError, UsageError."""
    if pool not in POOLS:
        raise UsageError(f"there is no pooling {pool!r}", f"use {', '.join(POOLS)}")
    scores = token_scores(model, texts, readouts, batch=batch, on_event=on_event)
    return torch.stack([pooled(each, text.counted, pool) for each, text in zip(scores, texts, strict=True)])
