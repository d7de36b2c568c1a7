"""One model as it is, times `scale`: for slices."""

from __future__ import annotations

import numpy as np

from merges.engine.tensor_task import Block, TensorTask
from vectors.options import Option

SUMMARY = "one model as it is, for slices"
SOURCE = "folklore (frankenmerges)"
SPACE, BASE, INPUTS = "weight", "unused", (1, 1)
OPTIONS = (Option("scale", 1.0, "the weights are multiplied by this"),)


def combine(tensor: TensorTask, block: Block, _prepared: None) -> np.ndarray:
    """scale * x."""
    return np.multiply(block.values[0], tensor.options["scale"], dtype=np.float64)
