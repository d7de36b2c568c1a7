"""Fisher merging: the average of the weights, each element weighted by its model's diagonal Fisher information.

`fisher` of each input is the path of a safetensors file with the Fisher information under the parameters' names. Where
that of all models is zero, the weighted average is taken.
"""

from __future__ import annotations

import numpy as np

from merges.engine.method import MergeMethod, Statistic
from merges.engine.tensor_task import Block, TensorTask
from merges.methods._options import weight


def statistic_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter's Fisher information: that of the parameter."""
    return shape


def problems_of(task: TensorTask) -> list[str]:
    """Refuse negative weights."""
    return ["fisher takes no negative weights"] if (task.each["weight"] < 0).any() else []


def combine(task: TensorTask, block: Block, _prepared: None) -> np.ndarray:
    """sum of w F x / sum of w F."""
    values, weights = block.values.astype(np.float64), task.each["weight"][:, None]
    shares = weights * np.abs(task.statistic("fisher", block).astype(np.float64))
    total = shares.sum(0)
    shares = np.where(total > 0, shares, weights)
    return (shares * values).sum(0) / shares.sum(0)


METHOD = MergeMethod(
    name="fisher",
    summary="the average, each element weighted by its Fisher information",
    source="Matena and Raffel 2022, arXiv:2111.09832",
    options=(weight(),),
    space="weight",
    base="unused",
    problems_of=problems_of,
    statistics=(Statistic("fisher", statistic_shape),),
    combine=combine,
)
