"""Model breadcrumbs with an election: leave out the greatest and the smallest of each delta, elect signs.

The greatest `gamma` are taken for outliers and dropped; of the rest the greatest `density` (counted against all) stay.
"""

from __future__ import annotations

import numpy as np

from merges import kernels
from merges.methods import _signs
from merges.methods.breadcrumbs import GAMMA
from merges.options import COMBINE, ELECT, SCALE, ZERO, density, weight
from merges.tensor import Block, Tensor

SUMMARY = "leave out the greatest and the smallest of each delta, elect signs"
SOURCE = "Davari and Belilovsky 2023, arXiv:2312.06795"
SPACE, BASE, INPUTS = "delta", "needed", (1, None)
OPTIONS = (weight(), density(0.15), GAMMA, SCALE, ELECT, COMBINE, ZERO, _signs.RESCALE)
GLOBAL = True


def prepare(tensor: Tensor) -> _signs.Trimming:
    """Between which magnitudes an element stays."""
    return _signs.trimming(tensor)


def combine(tensor: Tensor, block: Block, trimming: _signs.Trimming) -> np.ndarray:
    """Mask, combine."""
    low, high, factors = trimming
    kernels.trim(block.values, low, high)
    return _signs.elected(tensor, block, factors)
