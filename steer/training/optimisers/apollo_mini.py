"""APOLLO-Mini: one adaptive rate a matrix, from moments in a random projection of rank 1: almost no state."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from steer.training.optimisers import _apollo, _optimiser

SUMMARY = "APOLLO-Mini: one rate a matrix; almost no state, and closer to plain gradient descent"
SOURCE = "Zhu et al. 2025, arXiv:2412.05270"
OPTIONS = (_apollo.REFRESH, _apollo.LIMITER, _apollo.SCALE, _apollo.PROJECTION, *_optimiser.ADAMW_OPTIONS)


def build(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float = 0.0,
    seed: int = 0,
    refresh: int = 200,
    limiter: float = 1.01,
    scale: float = 1.0,
    projection: str = "signs",
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    rounding: str = "exact",
) -> torch.optim.Optimizer:
    """APOLLO-Mini over the matrices, AdamW over embeddings, head, norms and all else.

    State of a matrix [m, n]: 8 max(m, n) bytes. Raises UsageError.
    """
    return _apollo.build(
        parameters, "apollo-mini", lr=lr, weight_decay=weight_decay, seed=seed, rounding=rounding,
        beta1=beta1, beta2=beta2, eps=eps, rank=1, channels=False, refresh=refresh, limiter=limiter, scale=scale,
        mean_dtype="float32", projection=projection,
    )  # fmt: skip
