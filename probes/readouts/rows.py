"""What a readout is fitted to: at each layer one row for each text, or one for each token that counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from probes.capture.activations import activations
from probes.capture.spill import Spill
from probes.capture.states import Receive, token_states
from probes.models.tokens import Tokens
from vectors.events import OnEvent, ignore


class Measured(NamedTuple):
    """Rows of each layer [layers, rows, size] on disk or in memory, and the text of each row, int64 [rows].

    The caller closes `spill`.
    """

    spill: Spill
    owner: Tensor


class States(NamedTuple):
    """Where activations come from: `run(texts, layers, receive, on_event)` hands on states [tokens, `size`] by text."""

    size: int
    run: Callable[[Sequence[Tokens], Sequence[int], Receive, OnEvent], None]


def residual_states(model: nn.Module, hidden: int) -> States:
    """The residual stream of a model, the output of its blocks."""
    return States(
        hidden, lambda texts, layers, receive, on_event: token_states(model, texts, layers, receive, on_event=on_event)
    )


def mean_residuals(
    model: nn.Module, texts: Sequence[Tokens], layers: Sequence[int], *, on_event: OnEvent = ignore
) -> Measured:
    """The mean residual stream over the tokens of each text that count: every distinct token is computed once."""
    return Measured(activations(model, texts, layers, on_event=on_event).spill, torch.arange(len(texts)))


def measured(
    states: States, texts: Sequence[Tokens], layers: Sequence[int], *, per_token: bool, on_event: OnEvent = ignore
) -> Measured:
    """The mean activation of each text over its tokens that count, or with `per_token` that of each of these tokens."""
    counts = [len(text.counted) if per_token else 1 for text in texts]
    first = [0, *torch.tensor(counts).cumsum(0).tolist()]
    spill = Spill(len(layers), first[-1], states.size)

    def store(index: int, position: int, found: Tensor) -> None:
        rows = found[texts[index].counted]
        spill.write(position, range(first[index], first[index + 1]), rows if per_token else rows.mean(0, keepdim=True))

    try:
        states.run(texts, layers, store, on_event)
    except BaseException:
        spill.close()
        raise
    return Measured(spill, torch.repeat_interleave(torch.arange(len(texts)), torch.tensor(counts)))
