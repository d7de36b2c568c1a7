"""How deltas are put together once some of their elements are zero: summed, or averaged under an elected sign.

Both give the formula that the compiled pass runs on every element; steps.py says in whole arrays what it does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from merges.engine.fused import Elementwise
from merges.engine.tensor_task import TensorTask


def disjoint_mean(task: TensorTask, factors: np.ndarray | None = None, **dropping: Any) -> Elementwise:
    """Elect signs and combine what agrees, times lambda, by the options elect, combine and zero.

    `factors` [inputs] multiply the deltas first, as rescaling after a random drop does; `dropping` are the fields of an
    Elementwise that say which elements stay.
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
