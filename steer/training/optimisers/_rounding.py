"""Weights in bfloat16 that lose nothing: a step of 1e-5 of their size is far below half of their last place.

bfloat16 is the upper half of float32. So a float32 master need not be kept beside the weight: its lower half is enough,
two bytes a weight, and the two together are the master, bit for bit. Where even that is too much, the weight is rounded
up or down by chance, in proportion, so that small steps arrive on average.

    exact        the lower half is kept: what float32 masters give, and the weights are those masters, rounded
    stochastic   nothing is kept: right on average, with noise of one last place
    nearest      nothing is kept, steps below half a last place are lost; for comparison alone
"""

from __future__ import annotations

import torch
from torch import Tensor

MODES = ("exact", "stochastic", "nearest")


def widened(weight: Tensor, remainder: Tensor | None) -> Tensor:
    """The float32 values that a bfloat16 weight and the remainder (int16, or None for zero) stand for."""
    if remainder is None:
        return weight.float()
    return weight.view(torch.int16).int().bitwise_left_shift_(16).add_(remainder).view(torch.float32)


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """float32 values as bfloat16, halves rounded away from zero, and the int16 remainder that `widened` puts back."""
    bits = values.view(torch.int32)
    upper = (bits + 0x8000).bitwise_right_shift_(16)
    lower = bits - upper.bitwise_left_shift(16)
    return upper.to(torch.int16).view(torch.bfloat16), lower.to(torch.int16)


def stochastic(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 values as bfloat16, up with the probability of how far they lie above the value below; else down."""
    # One draw of 64 bits serves four values: drawing is most of the work.
    draws = torch.empty((values.numel() + 3) // 4, dtype=torch.int64, device=values.device)
    draws.random_(-(2**63), None, generator=generator)
    chance = draws.view(torch.int16)[: values.numel()].view(values.shape)
    bits = (values.contiguous().view(torch.int32) + chance).add_(0x8000)
    return bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
