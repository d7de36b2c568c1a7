"""APOLLO: AdamW's adaptive rates, one a channel, from moments in a random projection: little state for full weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from steer.training.optimisers import _apollo, _optimiser
from vectors.options import Option

SUMMARY = "APOLLO: rates by channel from projected moments; for training all weights in little memory"
SOURCE = "Zhu et al. 2025, arXiv:2412.05270"
OPTIONS = (
    Option("rank", 64, "of the random projection", low=1),
    *(_apollo.REFRESH, _apollo.LIMITER, _apollo.SCALE, _apollo.MEAN, _apollo.PROJECTION),
    *_optimiser.ADAMW_OPTIONS,
)


def build(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float = 0.0,
    seed: int = 0,
    rank: int = 64,
    refresh: int = 200,
    limiter: float = 1.01,
    scale: float = 1.0,
    mean_dtype: str = "bfloat16",
    projection: str = "signs",
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    rounding: str = "exact",
) -> torch.optim.Optimizer:
    """APOLLO over the matrices, AdamW over embeddings, head, norms and all else.

    State of a matrix [m, n]: 6 max(m, n) rank bytes. Projections are drawn from the seed, never saved.
    The direction is the raw gradient of the step, so it wants larger batches than AdamW: accumulate. Raises UsageError.
    """
    return _apollo.build(
        parameters, "apollo", lr=lr, weight_decay=weight_decay, seed=seed, rounding=rounding,
        beta1=beta1, beta2=beta2, eps=eps, rank=rank, channels=True, refresh=refresh, limiter=limiter, scale=scale,
        mean_dtype=mean_dtype, projection=projection,
    )  # fmt: skip
