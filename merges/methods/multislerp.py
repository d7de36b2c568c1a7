"""The weighted mean of several models on the sphere, a true one: for two models it is slerp.

mergekit's multislerp is the normalised weighted mean, which is a spherical mean for equal weights of two alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from merges.engine.fused import Fusion
from merges.engine.tensor_task import TensorTask
from merges.methods import _sphere
from vectors.options import Option, weight

SUMMARY = "the weighted mean on the sphere, of models or of their deltas"
SOURCE = "Karcher 1977; Buss and Fillmore 2001, Spherical averages"
SPACE, BASE, INPUTS = "either", "optional", (1, None)
OPTIONS = (weight(), Option("normalize", True, "the length is the mean of the lengths, not their weighted sum"))


def NORMALIZED(_options: Mapping[str, Any]) -> bool:
    """The weights' sum is divided by, and must not be zero."""
    return True


def check(tensor: TensorTask) -> list[str]:
    """Distances can't be weighted negatively."""
    return ["multislerp takes no negative weights"] if (tensor.each["weight"] < 0).any() else []


def prepare(tensor: TensorTask) -> np.ndarray:
    """The coefficients of the inputs."""
    weights = tensor.each["weight"]
    found = _sphere.mean(tensor.gram(), weights)
    return found if tensor.options["normalize"] else found * weights.sum()


def fusion(_tensor: TensorTask, coefficients: np.ndarray) -> Fusion:
    """Their combination."""
    return Fusion(coefficients)
