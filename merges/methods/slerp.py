"""Spherical interpolation of two models: along the arc between them, from the first (t = 0) to the second (t = 1).

Nearly parallel models (cosine above 0.9995) are interpolated linearly, as in mergekit; nuslerp always follows the arc.
"""

from __future__ import annotations

import numpy as np

from merges.engine.fused import Elementwise
from merges.engine.method import MergeMethod
from merges.engine.tensor_task import TensorTask
from merges.methods import _sphere
from vectors.registry.options import Option


def prepare(task: TensorTask) -> np.ndarray:
    """The coefficients of the two inputs, [2] float64."""
    return _sphere.slerp(task.gram(), float(task.options["t"]), _sphere.COLINEAR)


def elementwise(_task: TensorTask, coefficients: np.ndarray) -> Elementwise:
    """The combination of the two inputs."""
    return Elementwise(coefficients)


METHOD = MergeMethod(
    name="slerp",
    summary="along the arc from the first model to the second",
    source="Shoemake 1985, Animating rotation with quaternion curves",
    options=(Option("t", 0.5, "the position on the arc: 0 is the first model, 1 the second", low=0, high=1),),
    space="weight",
    base="unused",
    inputs=(2, 2),
    symmetric=False,
    prepare=prepare,
    elementwise=elementwise,
)
