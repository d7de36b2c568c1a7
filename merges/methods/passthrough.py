"""One model unchanged, or multiplied by `scale`; for slices."""

from __future__ import annotations

import numpy as np

from merges.engine.method import MergeMethod
from merges.engine.tensor_task import Block, TensorTask
from vectors.registry.options import Option


def combine(task: TensorTask, block: Block, _prepared: None) -> np.ndarray:
    """scale * x."""
    return np.multiply(block.values[0], task.each["scale"][0], dtype=np.float64)


METHOD = MergeMethod(
    name="passthrough",
    summary="one model unchanged, for slices",
    source="folklore (frankenmerges)",
    options=(Option("scale", 1.0, "a factor of the weights", each=True),),
    space="weight",
    base="unused",
    inputs=(1, 1),
    combine=combine,
)
