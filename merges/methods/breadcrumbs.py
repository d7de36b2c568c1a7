"""Model breadcrumbs: drop the greatest and the smallest magnitudes of each delta, and sum.

A share `gamma`, the greatest, is dropped as outliers; the next share `density`, of all elements, is kept.
"""

from __future__ import annotations

import numpy as np

from merges.engine.fused import Elementwise
from merges.engine.method import MergeMethod
from merges.engine.steps import trim, weighted_sum
from merges.engine.tensor_task import TensorTask
from merges.methods import _combining, _trimming
from merges.methods._options import NORMALIZE, SCALE, density, weight
from vectors.registry.options import Option

GAMMA = Option(
    "gamma",
    0.01,
    "the share of a delta's elements, those of greatest magnitude, that is dropped",
    each=True,
    low=0,
    high=1,
)


def mask(deltas: np.ndarray, density: np.ndarray, gamma: np.ndarray) -> list[np.ndarray]:
    """Each delta [inputs, ...] float32 without its greatest and its smallest magnitudes; both shares are [inputs]."""
    shares = zip(deltas, density, gamma, strict=True)
    return [
        trim(delta, *_trimming.limits_of(delta, kept_share, dropped_share))
        for delta, kept_share, dropped_share in shares
    ]


def breadcrumbs(deltas: np.ndarray, density: np.ndarray, gamma: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Model Breadcrumbs (Davari and Belilovsky 2023, arXiv:2312.06795): the merged delta, float64.

    `deltas` [inputs, ...] float32; `density`, `gamma` and `weights` [inputs] float64.
    """
    return weighted_sum(mask(deltas, density, gamma), weights)


def elementwise(task: TensorTask, trimming: _trimming.Trimming) -> Elementwise:
    """The method as a formula for the compiled pass, given the limits of the trimming."""
    return _combining.weighted_sum(task, **trimming._asdict())


METHOD = MergeMethod(
    name="breadcrumbs",
    summary="drop the greatest and the smallest magnitudes of each delta, and sum",
    source="Davari and Belilovsky 2023, arXiv:2312.06795",
    options=(weight(), density(0.15), GAMMA, SCALE, NORMALIZE, _trimming.RESCALE),
    space="delta",
    base="needed",
    global_scope=True,
    prepare=_trimming.prepare,
    elementwise=elementwise,
)
