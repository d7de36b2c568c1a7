"""The weighted average of the weights (or their sum, without `normalize`): model soups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merges.engine.fused import Elementwise
from merges.engine.method import MergeMethod
from merges.engine.tensor_task import TensorTask
from merges.methods import _combining
from merges.methods._options import weight
from vectors.registry.options import Option


def divides_by_weights(options: Mapping[str, Any]) -> bool:
    """Whether the result is divided by the sum of the weights, which must then not be zero."""
    return bool(options.get("normalize", True))


def elementwise(task: TensorTask, _prepared: None) -> Elementwise:
    """sum of weight * x / sum of weight."""
    return _combining.weighted_sum(task)


METHOD = MergeMethod(
    name="linear",
    summary="the weighted average of the weights",
    source="Wortsman et al. 2022, arXiv:2203.05482",
    options=(weight(), Option("normalize", True, "divide by the sum of the weights")),
    space="weight",
    base="unused",
    divides_by_weights=divides_by_weights,
    elementwise=elementwise,
)
