"""The weighted average of the weights (or their sum, without `normalize`): model soups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merges.engine.fused import Fusion
from merges.engine.tensor_task import TensorTask
from merges.methods import _signs
from vectors.options import Option, weight

SUMMARY = "the weighted average of the weights"
SOURCE = "Wortsman et al. 2022, arXiv:2203.05482"
SPACE, BASE, INPUTS = "weight", "unused", (1, None)
OPTIONS = (weight(), Option("normalize", True, "divide by the sum of the weights"))


def NORMALIZED(options: Mapping[str, Any]) -> bool:
    """Whether the weights' sum is divided by, and must not be zero."""
    return bool(options.get("normalize", True))


def fusion(tensor: TensorTask, _prepared: None) -> Fusion:
    """sum of weight * x / sum of weight."""
    return _signs.summed(tensor)
