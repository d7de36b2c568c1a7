"""DARE: drop elements of each delta at random, rescale what is left, and sum.

The random number of an element depends on the seed, the input's content, the tensor's name and the element's index
alone. The paper divides by the density; `rescale: l1` is mergekit's, which keeps the sum of magnitudes.
"""

from __future__ import annotations

import numpy as np

from merges.engine.fused import Fusion
from merges.engine.tensor_task import TensorTask
from merges.methods import _drop, _signs
from vectors.options import NORMALIZE, SCALE, density, weight

SUMMARY = "drop elements of each delta at random, rescale, sum"
SOURCE = "Yu et al. 2024, arXiv:2311.03099"
SPACE, BASE, INPUTS = "delta", "needed", (1, None)
OPTIONS = (weight(), density(0.5), SCALE, NORMALIZE, _drop.RESCALE)


def prepare(tensor: TensorTask) -> np.ndarray:
    """The factors that rescale."""
    return _drop.factors(tensor)


def fusion(tensor: TensorTask, factors: np.ndarray) -> Fusion:
    """Mask, rescale, combine."""
    return _signs.summed(tensor, factors, keys=_drop.keys(tensor), keep=tensor.each["density"])
