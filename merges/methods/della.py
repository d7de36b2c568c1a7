"""DELLA: drop the smaller elements of each row more often, rescale, elect signs.

The paper divides what survives by its own chance (rounded to float32 here); `rescale: l1` is mergekit's.
"""

from __future__ import annotations

import numpy as np

from merges.engine.tensor_task import Block, TensorTask
from merges.methods import _signs
from merges.methods._drop import RESCALE
from merges.methods._magnitude_drop import EPSILON, check, factors, prune
from vectors.options import COMBINE, ELECT, SCALE, ZERO, density, weight

SUMMARY = "drop the smaller elements of each row more often, rescale, elect signs"
SOURCE = "Deep et al. 2024, arXiv:2406.11617"
SPACE, BASE, INPUTS, UNIT = "delta", "needed", (1, None), "row"
OPTIONS = (weight(), density(0.5), SCALE, ELECT, COMBINE, ZERO, EPSILON, RESCALE)

__all__ = ["check"]


def prepare(tensor: TensorTask) -> np.ndarray | None:
    """The factors that rescale, where the whole tensor is asked."""
    return factors(tensor)


def combine(tensor: TensorTask, block: Block, scale: np.ndarray | None) -> np.ndarray:
    """Drop, rescale, combine."""
    prune(tensor, block, divide=tensor.options["rescale"] == "density")
    return block.apply(_signs.elected(tensor, scale))
