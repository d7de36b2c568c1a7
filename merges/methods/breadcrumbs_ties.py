"""Model breadcrumbs with an election: leave out the greatest and the smallest of each delta, elect signs.

The greatest `gamma` are taken for outliers and dropped; of the rest the greatest `density` (counted against all) stay.
"""

from __future__ import annotations

from typing import Any

from merges.engine.fused import Fusion
from merges.engine.tensor_task import TensorTask
from merges.methods import _signs
from merges.methods.breadcrumbs import GAMMA
from vectors.options import COMBINE, ELECT, SCALE, ZERO, density, weight

SUMMARY = "leave out the greatest and the smallest of each delta, elect signs"
SOURCE = "Davari and Belilovsky 2023, arXiv:2312.06795"
SPACE, BASE, INPUTS = "delta", "needed", (1, None)
OPTIONS = (weight(), density(0.15), GAMMA, SCALE, ELECT, COMBINE, ZERO, _signs.RESCALE)
GLOBAL = True


def prepare(tensor: TensorTask) -> dict[str, Any]:
    """Between which magnitudes an element stays."""
    return _signs.trimming(tensor)


def fusion(tensor: TensorTask, trimming: dict[str, Any]) -> Fusion:
    """Mask, elect, merge."""
    return _signs.elected(tensor, **trimming)
