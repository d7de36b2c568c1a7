"""Iso-C: the sum of the deltas with all singular values made equal, so that no task's directions drown another's.

Anything but a matrix is averaged.
"""

from __future__ import annotations

import numpy as np

from merges.engine.tensor_task import Block, TensorTask
from vectors.options import SCALE

SUMMARY = "the sum of the deltas with all singular values made equal"
SOURCE = "Marczak et al. 2025, arXiv:2502.04959, section 4"
SPACE, BASE, INPUTS, UNIT = "delta", "needed", (1, None), "tensor"
OPTIONS = (SCALE,)


def combine(tensor: TensorTask, block: Block, _prepared: None) -> np.ndarray:
    """mean(S) U V of the sum."""
    deltas = block.values.reshape(len(block.values), *tensor.shape).astype(np.float64)
    if len(tensor.shape) != 2:
        return tensor.options["lambda"] * deltas.mean(0)
    left, values, right = np.linalg.svd(deltas.sum(0), full_matrices=False)
    return tensor.options["lambda"] * values.mean() * (left @ right)
