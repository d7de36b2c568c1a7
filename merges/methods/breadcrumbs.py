"""Model breadcrumbs: leave out the greatest and the smallest of each delta, sum.

The greatest `gamma` are taken for outliers and dropped; of the rest the greatest `density` (counted against all) stay.
"""

from __future__ import annotations

from typing import Any

from merges.engine.fused import Fusion
from merges.engine.tensor_task import TensorTask
from merges.methods import _signs
from vectors.options import NORMALIZE, SCALE, Option, density, weight

SUMMARY = "leave out the greatest and the smallest of each delta, sum"
SOURCE = "Davari and Belilovsky 2023, arXiv:2312.06795"
SPACE, BASE, INPUTS = "delta", "needed", (1, None)
GAMMA = Option("gamma", 0.01, "the part of a delta, its greatest magnitudes, that is dropped", each=True, low=0, high=1)
OPTIONS = (weight(), density(0.15), GAMMA, SCALE, NORMALIZE, _signs.RESCALE)
GLOBAL = True


def prepare(tensor: TensorTask) -> dict[str, Any]:
    """Between which magnitudes an element stays."""
    return _signs.trimming(tensor)


def fusion(tensor: TensorTask, trimming: dict[str, Any]) -> Fusion:
    """Mask, sum."""
    return _signs.summed(tensor, **trimming)
