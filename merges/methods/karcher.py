"""The Karcher mean: the point of the sphere whose squared distances to all models sum to the least."""

from __future__ import annotations

import numpy as np

from merges.engine.fused import Fusion
from merges.engine.tensor_task import TensorTask
from merges.methods import _sphere
from vectors.options import Option

SUMMARY = "the mean on the sphere, all inputs alike"
SOURCE = "Karcher 1977; Buss and Fillmore 2001, Spherical averages"
SPACE, BASE, INPUTS = "weight", "unused", (1, None)
OPTIONS = (
    Option("max_iter", 100, "the most steps", low=1, high=100000),
    Option("tol", 1e-12, "the length of a step that ends the search", low=0, high=1),
)


def prepare(tensor: TensorTask) -> np.ndarray:
    """The coefficients of the inputs."""
    return _sphere.mean(
        tensor.gram(),
        np.ones(len(tensor.inputs)),
        steps=int(tensor.options["max_iter"]),
        tolerance=float(tensor.options["tol"]),
    )


def fusion(_tensor: TensorTask, coefficients: np.ndarray) -> Fusion:
    """Their combination."""
    return Fusion(coefficients)
