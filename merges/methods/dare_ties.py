"""DARE, then TIES: drop at random, rescale, elect a sign for each element, and combine the values that agree.

The paper divides by the density; `rescale: l1` is mergekit's, which preserves the L1 norm.
"""

from __future__ import annotations

import numpy as np

from merges.engine.fused import Elementwise
from merges.engine.method import MergeMethod
from merges.engine.steps import disjoint_mean, elect_signs
from merges.engine.tensor_task import TensorTask
from merges.methods import _combining, _random_drop
from merges.methods._options import COMBINE, ELECT, SCALE, ZERO, density, weight


def dare_ties(deltas: np.ndarray, density: np.ndarray, weights: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """DARE (Yu et al. 2024, arXiv:2311.03099), then the sign election of TIES: the merged delta, float64.

    `deltas` [inputs, ...] float32; `density` and `weights` [inputs] float64; `keys` [inputs] uint64, see _random_drop.
    """
    dropped = [_random_drop.drop(*each) for each in zip(deltas, keys, density, strict=True)]
    rescaled = [delta * factor for delta, factor in zip(dropped, _random_drop.inverse(density), strict=True)]
    signs = elect_signs(rescaled, votes=np.sign(weights))
    return disjoint_mean(rescaled, weights, signs)


def elementwise(task: TensorTask, factors: np.ndarray) -> Elementwise:
    """The method as a formula for the compiled pass; `factors` rescale the deltas, [inputs] float64."""
    return _combining.disjoint_mean(task, factors, keys=_random_drop.keys(task), keep=task.each["density"])


METHOD = MergeMethod(
    name="dare_ties",
    summary="drop elements of each delta at random, rescale, elect signs",
    source="Yu et al. 2024, arXiv:2311.03099",
    options=(weight(), density(0.5), SCALE, ELECT, COMBINE, ZERO, _random_drop.RESCALE),
    space="delta",
    base="needed",
    prepare=_random_drop.factors,
    elementwise=elementwise,
)
