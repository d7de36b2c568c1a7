"""The Karcher mean: the point of the sphere with the least sum of squared distances to all models."""

from __future__ import annotations

import numpy as np

from merges.engine.fused import Elementwise
from merges.engine.method import MergeMethod
from merges.engine.tensor_task import TensorTask
from merges.methods import _sphere
from vectors.registry.options import Option


def prepare(task: TensorTask) -> np.ndarray:
    """The coefficients of the inputs, [inputs] float64."""
    return _sphere.mean(
        task.gram(),
        np.ones(len(task.inputs)),
        steps=int(task.options["max_iter"]),
        tolerance=float(task.options["tol"]),
    )


def elementwise(_task: TensorTask, coefficients: np.ndarray) -> Elementwise:
    """The linear combination of the inputs with these coefficients."""
    return Elementwise(coefficients)


METHOD = MergeMethod(
    name="karcher",
    summary="the mean on the sphere, with equal weights",
    source="Karcher 1977; Buss and Fillmore 2001, Spherical averages",
    options=(
        Option("max_iter", 100, "the maximal number of iterations", low=1, high=100000),
        Option("tol", 1e-12, "iteration stops when a step is shorter than this", low=0, high=1),
    ),
    space="weight",
    base="unused",
    prepare=prepare,
    elementwise=elementwise,
)
