"""AdamW: torch's fused step, on float32 whatever the weights are in."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from steer.training.optimisers import _optimiser

SUMMARY = "AdamW, fused; the default"
SOURCE = "Loshchilov and Hutter 2019, arXiv:1711.05101; torch.optim"
OPTIONS = _optimiser.ADAMW_OPTIONS


def build(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float = 0.0,
    seed: int = 0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    rounding: str = "exact",
) -> torch.optim.Optimizer:
    """AdamW over named parameters. Norms and biases are not decayed.

    The second beta is torch's 0.999, not the 0.95 of pre-training recipes: a bake has few and small batches, whose
    squares are noisy. State: 8 bytes a weight; `exact` rounding of bfloat16 adds 2. Raises UsageError.
    """
    groups = _optimiser.adamw_groups(parameters, weight_decay, beta1=beta1, beta2=beta2, eps=eps)
    return _optimiser.Optimiser(groups, {"adamw": _optimiser.adamw}, lr=lr, seed=seed, rounding=rounding)
