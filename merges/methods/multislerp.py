"""The weighted spherical (Karcher) mean of several models; for two models it is slerp.

mergekit's multislerp is the normalised weighted mean, which equals this only for two models of equal weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from merges.engine.fused import Elementwise
from merges.engine.method import MergeMethod
from merges.engine.tensor_task import TensorTask
from merges.methods import _sphere
from merges.methods._options import weight
from vectors.registry.options import Option


def divides_by_weights(_options: Mapping[str, Any]) -> bool:
    """The result is divided by the sum of the weights, which must not be zero."""
    return True


def problems_of(task: TensorTask) -> list[str]:
    """Refuse negative weights."""
    return ["multislerp takes no negative weights"] if (task.each["weight"] < 0).any() else []


def prepare(task: TensorTask) -> np.ndarray:
    """The coefficients of the inputs, [inputs] float64."""
    weights = task.each["weight"]
    coefficients = _sphere.mean(task.gram(), weights)
    return coefficients if task.options["normalize"] else coefficients * weights.sum()


def elementwise(_task: TensorTask, coefficients: np.ndarray) -> Elementwise:
    """The linear combination of the inputs with these coefficients."""
    return Elementwise(coefficients)


METHOD = MergeMethod(
    name="multislerp",
    summary="the weighted mean on the sphere, of models or of their deltas",
    source="Karcher 1977; Buss and Fillmore 2001, Spherical averages",
    options=(
        weight(),
        Option(
            "normalize", True, "the length of the result is the weighted mean of the lengths, not their weighted sum"
        ),
    ),
    space="either",
    base="optional",
    divides_by_weights=divides_by_weights,
    problems_of=problems_of,
    prepare=prepare,
    elementwise=elementwise,
)
