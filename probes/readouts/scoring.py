"""What readouts say of texts: the score h w + b of every token, and one score for each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from probes.capture.activations import BATCH
from probes.capture.states import token_states
from probes.models.tokens import Tokens
from probes.readouts.rows import States
from vectors.errors import UsageError
from vectors.events import OnEvent, ignore
from vectors.probe import Readout

Pool = Literal["mean", "max", "last"]
POOLS: tuple[Pool, ...] = get_args(Pool)


def require_pool(pool: str) -> Pool:
    """The pooling of this name. Raises UsageError."""
    if pool not in POOLS:
        raise UsageError(f"there is no pooling {pool!r}", f"use {', '.join(POOLS)}")
    return pool


def token_scores(
    model: nn.Module | States,
    texts: Sequence[Tokens],
    readouts: Mapping[int, Readout],
    *,
    batch: int = BATCH,
    on_event: OnEvent = ignore,
) -> list[Tensor]:
    """The scores of every token of each text by the readout of each layer, float32 [tokens, layers] on the CPU.

    The columns are in the order of `readouts`. Tokens that do not count have a score too. A model gives its residual
    stream; `States` are those of another site. Raises ModelError.
    """
    layers = list(readouts)
    scores = [torch.empty(len(text.ids), len(layers)) for text in texts]
    moved: dict[int, Readout] = {}

    def score(index: int, position: int, states: Tensor) -> None:
        if position not in moved:
            weight, bias = readouts[layers[position]]
            moved[position] = Readout(weight.to(states.device), bias)
        scores[index][:, position] = moved[position].scores(states).cpu()

    if isinstance(model, States):
        model.run(texts, layers, score, on_event)
    else:
        token_states(model, texts, layers, score, batch=batch, on_event=on_event)
    return scores


def pooled(scores: Tensor, counted: Sequence[int], pool: Pool) -> Tensor:
    """One score for a text, from those of its tokens [tokens, ...] that count: their mean, the greatest or the last.

    The mean is the score of the mean activation, since a readout is linear.
    """
    chosen = scores[list(counted)]
    if require_pool(pool) == "last":
        return chosen[-1]
    return chosen.mean(0) if pool == "mean" else chosen.amax(0)


def text_scores(
    model: nn.Module | States,
    texts: Sequence[Tokens],
    readouts: Mapping[int, Readout],
    *,
    pool: Pool = "mean",
    batch: int = BATCH,
    on_event: OnEvent = ignore,
) -> Tensor:
    """The score of each text by the readout of each layer, float32 [texts, layers]. Raises ModelError, UsageError."""
    require_pool(pool)
    scores = token_scores(model, texts, readouts, batch=batch, on_event=on_event)
    return torch.stack([pooled(each, text.counted, pool) for each, text in zip(scores, texts, strict=True)])
