"""Spherical interpolation of two models: along the arc between them, from the first (t = 0) to the second (t = 1).

Nearly parallel models (cosine above 0.9995) are interpolated along the chord, as in mergekit; nuslerp keeps to the arc.
"""

from __future__ import annotations

import numpy as np

from merges.engine.fused import Fusion
from merges.engine.tensor_task import TensorTask
from merges.methods import _sphere
from vectors.options import Option

SUMMARY = "along the arc from the first to the second"
SOURCE = "Shoemake 1985, Animating rotation with quaternion curves"
SPACE, BASE, INPUTS, SYMMETRIC = "weight", "unused", (2, 2), False
OPTIONS = (Option("t", 0.5, "how far from the first to the second", low=0, high=1),)


def prepare(tensor: TensorTask) -> np.ndarray:
    """The coefficients of the two."""
    return _sphere.slerp(tensor.gram(), float(tensor.options["t"]), _sphere.COLINEAR)


def fusion(_tensor: TensorTask, coefficients: np.ndarray) -> Fusion:
    """Their combination."""
    return Fusion(coefficients)
