"""TIES: trim each delta to its greatest magnitudes, elect a sign for each element, average what agrees with it.

The paper (algorithm 1) trims over the whole model (`scope: global`); most tools trim each tensor for itself. It has
no weights: here signs are elected before weighting, or `elect: after`; a negative weight adds the negated vector.
Where the votes cancel no sign is elected and the result is zero, as sgn(0) = 0 in the
paper; `zero: positive` is mergekit's.
"""

from __future__ import annotations

from typing import Any

from merges.engine.fused import Fusion
from merges.engine.tensor_task import TensorTask
from merges.methods import _signs
from vectors.options import COMBINE, ELECT, SCALE, ZERO, density, weight

SUMMARY = "trim each delta, elect a sign for each element, average what agrees"
SOURCE = "Yadav et al. 2023, arXiv:2306.01708, algorithm 1"
SPACE, BASE, INPUTS = "delta", "needed", (1, None)
OPTIONS = (weight(), density(), SCALE, ELECT, COMBINE, ZERO, _signs.RESCALE)
GLOBAL = True


def prepare(tensor: TensorTask) -> dict[str, Any]:
    """Between which magnitudes an element stays."""
    return _signs.trimming(tensor)


def fusion(tensor: TensorTask, trimming: dict[str, Any]) -> Fusion:
    """Trim, elect, merge."""
    return _signs.elected(tensor, **trimming)
