"""Model breadcrumbs with sign election: drop the greatest and the smallest magnitudes of each delta, elect signs.

A share `gamma`, the greatest, is dropped as outliers; the next share `density`, of all elements, is kept.
"""

from __future__ import annotations

import numpy as np

from merges.engine.fused import Elementwise
from merges.engine.method import MergeMethod
from merges.engine.steps import disjoint_mean, elect_signs
from merges.engine.tensor_task import TensorTask
from merges.methods import _combining, _trimming
from merges.methods._options import COMBINE, ELECT, SCALE, ZERO, density, weight
from merges.methods.breadcrumbs import GAMMA, mask


def breadcrumbs_ties(deltas: np.ndarray, density: np.ndarray, gamma: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mask of Model Breadcrumbs (arXiv:2312.06795), then the sign election of TIES: the merged delta, float64.

    `deltas` [inputs, ...] float32; `density`, `gamma` and `weights` [inputs] float64.
    """
    masked = mask(deltas, density, gamma)
    signs = elect_signs(masked, votes=np.sign(weights))
    return disjoint_mean(masked, weights, signs)


def elementwise(task: TensorTask, trimming: _trimming.Trimming) -> Elementwise:
    """The method as a formula for the compiled pass, given the limits of the trimming."""
    return _combining.disjoint_mean(task, **trimming._asdict())


METHOD = MergeMethod(
    name="breadcrumbs_ties",
    summary="drop the greatest and the smallest magnitudes of each delta, elect signs",
    source="Davari and Belilovsky 2023, arXiv:2312.06795",
    options=(weight(), density(0.15), GAMMA, SCALE, ELECT, COMBINE, ZERO, _trimming.RESCALE),
    space="delta",
    base="needed",
    global_scope=True,
    prepare=_trimming.prepare,
    elementwise=elementwise,
)
