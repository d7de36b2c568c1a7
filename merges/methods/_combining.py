"""Combining sparse deltas: their weighted sum, or the disjoint mean under elected signs.

Both return the formula that the compiled pass applies to every element; steps.py defines the same on whole arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from merges.engine.fused import Elementwise
from merges.engine.tensor_task import TensorTask


def disjoint_mean(task: TensorTask, factors: np.ndarray | None = None, **dropping: Any) -> Elementwise:
    """Elect signs, combine the values that agree with them and multiply by lambda; options elect, combine and zero.

    `factors` [inputs] multiply the deltas first, such as the rescaling after a random drop; `dropping` are fields of an
    Elementwise that select the elements to keep.
    """
    weights = task.each["weight"]
    return Elementwise(
        weights,
        factors,
        votes=np.sign(weights) if task.options["elect"] == "before" else weights,
        mean=task.options["combine"] == "mean",
        positive=task.options["zero"] == "positive",
        scale=task.options["lambda"],
        **dropping,
    )


def weighted_sum(task: TensorTask, factors: np.ndarray | None = None, **dropping: Any) -> Elementwise:
    """The weighted sum of factor * delta, divided by the sum of the weights if `normalize`, times lambda."""
    weights = task.each["weight"]
    if task.options.get("normalize"):
        weights = weights / weights.sum()
    return Elementwise(weights, factors, scale=task.options.get("lambda", 1.0), **dropping)
