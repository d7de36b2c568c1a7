"""What each operation of the expression language adds to the residual stream: the formulas of `vectors.expression`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of the stream's norm: what is beyond the direction is rounding below it, and names no plane to turn in.
NO_PLANE = 1e-6


def change_of(operation: str, value: float, direction: Tensor, stream: Tensor, mean: float = 0.0) -> Tensor:
    """What an operation adds to the stream [..., hidden], in its dtype; it broadcasts to that shape.

    `direction` [hidden] in the same dtype; `mean` is the mean projection in units of strength. A zero direction adds
    nothing.
    """
    if operation == "add":
        return value * direction
    length = direction.norm()
    if float(length) == 0.0:
        return torch.zeros_like(direction)  # a zero vector has no direction
    unit = direction / length
    if operation == "share":
        return value / 100 * stream.norm(dim=-1, keepdim=True) * unit
    component = (stream @ unit)[..., None]
    if operation == "ablate":
        return -value * component * unit
    if operation == "mean_ablate":
        return -value * (component - mean * length) * unit
    if operation == "clamp":
        return (value * length - component) * unit
    assert operation == "rotate"
    return _rotation(value, unit, component, stream)


def _rotation(degrees: float, unit: Tensor, component: Tensor, stream: Tensor) -> Tensor:
    """What turns the stream towards a unit direction, at most as far as to it; away, and at most as far as to its
    opposite, with negative degrees. A stream along the direction spans no plane with it, and stays.
    """
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    beyond = stream - component * unit
    height = beyond.norm(dim=-1, keepdim=True)
    norm = stream.norm(dim=-1, keepdim=True)
    # In the plane, h is (component, height). Its height turns negative where it would pass the direction.
    along, above = cosine * component + sine * height, cosine * height - sine * component
    passes = above < 0
    along = torch.where(passes, math.copysign(1.0, degrees) * norm, along)
    above = above.clamp(min=0.0)
    turned = (along - component) * unit + (above / height - 1) * beyond
    return torch.where(height > NO_PLANE * norm, turned, torch.zeros_like(turned))
