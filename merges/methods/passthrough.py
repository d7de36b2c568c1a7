"""One model as it is, times `scale`: for slices."""

from __future__ import annotations

import numpy as np

from merges.engine.method import MergeMethod
from merges.engine.tensor_task import Block, TensorTask
from vectors.options import Option


def combine(task: TensorTask, block: Block, _prepared: None) -> np.ndarray:
    """scale * x."""
    return np.multiply(block.values[0], task.options["scale"], dtype=np.float64)


METHOD = MergeMethod(
    name="passthrough",
    summary="one model as it is, for slices",
    source="folklore (frankenmerges)",
    options=(Option("scale", 1.0, "the weights are multiplied by this"),),
    space="weight",
    base="unused",
    inputs=(1, 1),
    combine=combine,
)
