"""DARE: drop elements of each delta at random, rescale the rest, and sum.

The paper divides by the density; `rescale: l1` is mergekit's, which preserves the L1 norm.
"""

from __future__ import annotations

import numpy as np

from merges.engine.fused import Elementwise
from merges.engine.method import MergeMethod
from merges.engine.steps import weighted_sum
from merges.engine.tensor_task import TensorTask
from merges.methods import _combining, _random_drop
from merges.methods._options import NORMALIZE, SCALE, density, weight


def dare_linear(deltas: np.ndarray, density: np.ndarray, weights: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """DARE (Yu et al. 2024, arXiv:2311.03099): the merged delta, float64.

    `deltas` [inputs, ...] float32; `density` and `weights` [inputs] float64; `keys` [inputs] uint64, see _random_drop.
    """
    dropped = [_random_drop.drop(*each) for each in zip(deltas, keys, density, strict=True)]
    return weighted_sum(dropped, weights * _random_drop.inverse(density))


def elementwise(task: TensorTask, factors: np.ndarray) -> Elementwise:
    """The method as a formula for the compiled pass; `factors` rescale the deltas, [inputs] float64."""
    return _combining.weighted_sum(task, factors, keys=_random_drop.keys(task), keep=task.each["density"])


METHOD = MergeMethod(
    name="dare_linear",
    summary="drop elements of each delta at random, rescale, sum",
    source="Yu et al. 2024, arXiv:2311.03099",
    options=(weight(), density(0.5), SCALE, NORMALIZE, _random_drop.RESCALE),
    space="delta",
    base="needed",
    prepare=_random_drop.factors,
    elementwise=elementwise,
)
