"""Task arithmetic: the base plus lambda times the weighted sum of the deltas. A negative weight takes a task away."""

from __future__ import annotations

from merges.engine.fused import Fusion
from merges.engine.tensor_task import TensorTask
from merges.methods import _signs
from vectors.options import NORMALIZE, SCALE, weight

SUMMARY = "the weighted sum of the deltas"
SOURCE = "Ilharco et al. 2023, arXiv:2212.04089"
SPACE, BASE, INPUTS = "delta", "needed", (1, None)
OPTIONS = (weight(), SCALE, NORMALIZE)


def fusion(tensor: TensorTask, _prepared: None) -> Fusion:
    """lambda * sum of weight * delta."""
    return _signs.summed(tensor)
