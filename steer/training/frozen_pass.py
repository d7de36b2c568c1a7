"""The pass of `--context frozen`: prompts are computed once and stay fixed for a while; completions alone are trained.

Batches come in the same order every epoch, so a batch's contexts serve again until the weights have moved on: at every
checkpoint all are given up, and computed anew when they are needed, which notes how far they had fallen behind. So a
run that goes on from a checkpoint has the contexts that it would have had.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steer.training import frozen_context, loop
from steer.training.frozen_context import FrozenContext

ROOM = 1 << 30  # bytes of states that are kept at a time


class _Kept(NamedTuple):
    context: FrozenContext
    period: int  # between two checkpoints, in which it was computed


class FrozenPass:
    """Gives the logits of a batch behind frozen contexts in training, and of the whole sequences otherwise.

    `stale` holds what each renewal found: KL(fresh || frozen) in nats.
    """

    def __init__(self, every: int = 50) -> None:
        """`every`: the batches from one checkpoint to the next."""
        self.every, self.batches = every, 0
        self.kept: dict[bytes, _Kept] = {}
        self.used = 0
        self.stale: list[float] = []

    def __call__(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [count, vocabulary] before each token of a completion."""
        if not model.training:
            return loop.whole_pass(model, batch)  # what is judged is what will be served
        ids, mask = batch["input_ids"], batch["attention_mask"]
        place = torch.arange(ids.shape[1], device=ids.device)
        labelled = (place >= batch["prompts"][:, None]) & mask.bool()
        cut = frozen_context.split(ids, mask, ids.masked_fill(~labelled, frozen_context.IGNORED))
        logits = frozen_context.continued(model, self._context(model, cut), cut.segment_ids, cut.segment_mask)
        self.batches += 1
        return logits[:, :-1][cut.labels[:, 1:] != frozen_context.IGNORED]

    def _context(self, model: Any, cut: frozen_context.Split) -> FrozenContext:
        key = cut.context_ids.cpu().numpy().tobytes() + cut.context_mask.cpu().numpy().tobytes()
        kept, period = self.kept.get(key), self.batches // self.every
        if kept is not None and kept.period == period:
            return kept.context
        if kept is None:
            context = frozen_context.freeze(model, cut.context_ids, cut.context_mask)
            size = _bytes(context)
            if self.used + size > ROOM:
                return context
            self.used += size
        else:
            stale, context = frozen_context.staleness(model, kept.context, cut.segment_ids, cut.segment_mask)
            self.stale.append(stale)
        self.kept[key] = _Kept(context, period)
        return context


def _bytes(context: FrozenContext) -> int:
    """What the states of a context take."""
    values = [value for layer in context.cache.layers for value in vars(layer).values()]
    flat = [one for value in values for one in (value.values() if isinstance(value, dict) else [value])]
    return sum(one.numel() * one.element_size() for one in flat if isinstance(one, Tensor))
