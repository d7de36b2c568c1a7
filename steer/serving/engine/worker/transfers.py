"""From the host to the device without waiting for it.

The memory is pinned for each copy alone, since the copy before may still be running. Without a GPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pinned(values: Tensor | np.ndarray | Sequence[int], device: torch.device) -> Tensor:
    """The values as a tensor on the host, from which a copy to the device does not make a step wait."""
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values)
    tensor = values if isinstance(values, Tensor) else torch.tensor(values)
    return tensor.contiguous().pin_memory() if device.type == "cuda" else tensor


def to_device(values: Tensor | np.ndarray | Sequence[int], device: torch.device) -> Tensor:
    """The values as a tensor on the device."""
    return pinned(values, device).to(device, non_blocking=True)
