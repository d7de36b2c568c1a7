"""Rounding of bfloat16 weights, so that small steps are not lost: a step of 1e-5 of a weight rounds to nothing.

bfloat16 is the upper half of float32. A float32 master weight is therefore the bfloat16 weight and the lower half, bit
for bit: storing the lower half costs two bytes per weight instead of four for a master. Stochastic rounding stores
nothing: it rounds up or down at random, so that small steps take effect on average.

    exact        stores the lower half: as with float32 master weights
    stochastic   stores nothing: unbiased, with noise of one unit in the last place
    nearest      stores nothing: steps below half a unit in the last place are lost; for comparison only
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
    """float32 values rounded to bfloat16 at random, up or down, so that the mean over draws is the value itself."""
    # One 64-bit draw serves four values, since drawing takes most of the time.
    draws = torch.empty((values.numel() + 3) // 4, dtype=torch.int64, device=values.device)
    draws.random_(-(2**63), None, generator=generator)
    chance = draws.view(torch.int16)[: values.numel()].view(values.shape)
    bits = (values.contiguous().view(torch.int32) + chance).add_(0x8000)
    return bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
