"""APOLLO: AdamW's adaptive rates, one per channel, from moments in a random projection: little optimiser state."""

from __future__ import annotations

from typing import Any

import torch

from steer.training.optimisers import _apollo, _optimiser
from steer.training.optimisers._protocol import Parameters
from vectors.registry.options import Option

SUMMARY = "APOLLO: rates per channel from projected moments; for training all weights in little memory"
SOURCE = "Zhu et al. 2025, arXiv:2412.05270"
OPTIONS = (
    Option("rank", 64, "rank of the random projection", low=1),
    *_apollo.OPTIONS,
    _apollo.MEAN,
    *_optimiser.ADAMW_OPTIONS,
)


def build(
    parameters: Parameters, *, lr: float, weight_decay: float, seed: int, **options: Any
) -> torch.optim.Optimizer:
    """APOLLO over the matrices, AdamW over embeddings, head, norms and all else.

    State of a matrix [m, n]: 6 max(m, n) rank bytes. Projections are drawn from the seed, never saved.
    The step's direction is the raw gradient, so it needs larger batches than AdamW (accumulate). Raises UsageError.
    """
    return _apollo.build(
        parameters, {"name": "apollo", "weight_decay": weight_decay, "channels": True, **options}, lr=lr, seed=seed
    )
