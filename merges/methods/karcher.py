"""The Karcher mean: the point of the sphere whose squared distances to all models sum to the least."""

from __future__ import annotations

import numpy as np

from merges.engine.fused import Elementwise
from merges.engine.method import MergeMethod
from merges.engine.tensor_task import TensorTask
from merges.methods import _sphere
from vectors.options import Option


def prepare(task: TensorTask) -> np.ndarray:
    """The coefficients of the inputs."""
    return _sphere.mean(
        task.gram(),
        np.ones(len(task.inputs)),
        steps=int(task.options["max_iter"]),
        tolerance=float(task.options["tol"]),
    )


def elementwise(_task: TensorTask, coefficients: np.ndarray) -> Elementwise:
    """Their combination."""
    return Elementwise(coefficients)


METHOD = MergeMethod(
    name="karcher",
    summary="the mean on the sphere, all inputs alike",
    source="Karcher 1977; Buss and Fillmore 2001, Spherical averages",
    options=(
        Option("max_iter", 100, "the most steps", low=1, high=100000),
        Option("tol", 1e-12, "the length of a step that ends the search", low=0, high=1),
    ),
    space="weight",
    base="unused",
    prepare=prepare,
    elementwise=elementwise,
)
