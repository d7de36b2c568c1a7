"""AdamW: torch's fused step, in float32 for weights of any dtype."""

from __future__ import annotations

from typing import Any

import torch

from steer.training.optimisers import _optimiser
from steer.training.optimisers._protocol import Parameters

SUMMARY = "AdamW, fused; the default"
SOURCE = "Loshchilov and Hutter 2019, arXiv:1711.05101; torch.optim"
OPTIONS = _optimiser.ADAMW_OPTIONS


def build(
    parameters: Parameters, *, lr: float, weight_decay: float, seed: int, rounding: str, **adam: Any
) -> torch.optim.Optimizer:
    """AdamW over named parameters. Norms and biases are not decayed.

    The second beta is torch's 0.999, not the 0.95 of pre-training recipes: a bake has few and small batches, whose
    squared gradients are noisy. State: 8 bytes per weight; `exact` rounding of bfloat16 adds 2. Raises UsageError.
    """
    groups = _optimiser.adamw_groups(parameters, weight_decay, **adam)
    return _optimiser.Optimiser(groups, {"adamw": _optimiser.adamw}, lr=lr, seed=seed, rounding=rounding)
