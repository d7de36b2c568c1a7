"""The forward pass of `--context frozen`: prompts are computed once and reused; only completions are trained.

Every epoch has the same batches, so the contexts of a batch are reused until the next checkpoint. After a checkpoint,
each context is computed anew the next time its batch comes, and its staleness is recorded. A run resumed from a
checkpoint therefore trains on the same contexts as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steer.training import frozen_context, loop
from steer.training.frozen_context import FrozenContext

CACHE_BYTES = 1 << 30  # at most, of contexts held in memory


class _Cached(NamedTuple):
    context: FrozenContext
    period: int  # number of the interval between checkpoints in which it was computed


class FrozenPass:
    """Computes the logits of a batch: behind frozen contexts in training, over whole sequences in evaluation.

    `stale` holds KL(fresh || frozen), in nats, of each context that was computed anew.
    """

    def __init__(self, every: int = 50) -> None:
        """`every`: the number of batches between two checkpoints."""
        self.every, self.batches = every, 0
        self.cached: dict[bytes, _Cached] = {}
        self.used = 0
        self.stale: list[float] = []

    def __call__(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [count, vocabulary] before each token of a completion."""
        if not model.training:
            return loop.whole_pass(model, batch)  # as it will be served: the prompt under the trained weights
        ids, mask = batch["input_ids"], batch["attention_mask"]
        positions = torch.arange(ids.shape[1], device=ids.device)
        labelled = (positions >= batch["prompts"][:, None]) & mask.bool()
        cut = frozen_context.split(ids, mask, ids.masked_fill(~labelled, frozen_context.IGNORED))
        logits = frozen_context.continued(model, self._context(model, cut), cut.segment_ids, cut.segment_mask)
        self.batches += 1
        return logits[:, :-1][cut.labels[:, 1:] != frozen_context.IGNORED]

    def _context(self, model: Any, cut: frozen_context.Split) -> FrozenContext:
        key = cut.context_ids.cpu().numpy().tobytes() + cut.context_mask.cpu().numpy().tobytes()
        cached, period = self.cached.get(key), self.batches // self.every
        if cached is not None and cached.period == period:
            return cached.context
        if cached is None:
            context = frozen_context.freeze(model, cut.context_ids, cut.context_mask)
            size = _bytes(context)
            if self.used + size > CACHE_BYTES:
                return context
            self.used += size
        else:
            stale, context = frozen_context.staleness(model, cached.context, cut.segment_ids, cut.segment_mask)
            self.stale.append(stale)
        self.cached[key] = _Cached(context, period)
        return context


def _bytes(context: FrozenContext) -> int:
    """The memory that the cache of a context takes."""
    values = [value for layer in context.cache.layers for value in vars(layer).values()]
    states = [state for value in values for state in (value.values() if isinstance(value, dict) else [value])]
    return sum(state.numel() * state.element_size() for state in states if isinstance(state, Tensor))
