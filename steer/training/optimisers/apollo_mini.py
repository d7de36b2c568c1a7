"""APOLLO-Mini: one adaptive rate per matrix, from moments in a random projection of rank 1: almost no state."""

from __future__ import annotations

from typing import Any

import torch

from steer.training.optimisers import _apollo, _optimiser
from steer.training.optimisers._protocol import Parameters

SUMMARY = "APOLLO-Mini: one rate per matrix; almost no state, and closer to plain gradient descent"
SOURCE = "Zhu et al. 2025, arXiv:2412.05270"
OPTIONS = (*_apollo.OPTIONS, *_optimiser.ADAMW_OPTIONS)
FIXED = {"rank": 1, "channels": False, "mean_dtype": "float32"}


def build(
    parameters: Parameters, *, lr: float, weight_decay: float, seed: int, **options: Any
) -> torch.optim.Optimizer:
    """APOLLO-Mini over the matrices, AdamW over embeddings, head, norms and all else.

    State of a matrix [m, n]: 8 max(m, n) bytes. Raises UsageError.
    """
    return _apollo.build(
        parameters, {"name": "apollo-mini", "weight_decay": weight_decay, **FIXED, **options}, lr=lr, seed=seed
    )
