"""Task arithmetic: the base plus lambda times the weighted sum of the deltas. A negative weight removes a task."""

from __future__ import annotations

from merges.engine.fused import Elementwise
from merges.engine.method import MergeMethod
from merges.engine.tensor_task import TensorTask
from merges.methods import _combining
from merges.methods._options import NORMALIZE, SCALE, weight


def elementwise(task: TensorTask, _prepared: None) -> Elementwise:
    """lambda * sum of weight * delta."""
    return _combining.weighted_sum(task)


METHOD = MergeMethod(
    name="task_arithmetic",
    summary="the weighted sum of the deltas",
    source="Ilharco et al. 2023, arXiv:2212.04089",
    options=(weight(), SCALE, NORMALIZE),
    space="delta",
    base="needed",
    elementwise=elementwise,
)
