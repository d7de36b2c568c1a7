"""Spherical interpolation by weights: t = w2 / (w1 + w2), of two models or, with a base, of their deltas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from merges import kernels
from merges.methods import _sphere
from merges.options import Option, weight
from merges.tensor import Block, Tensor

SUMMARY = "along the arc between two models, or their deltas, by weight"
SOURCE = "mergekit's nuslerp; Shoemake 1985"
SPACE, BASE, INPUTS, SYMMETRIC = "either", "optional", (2, 2), False
OPTIONS = (weight(), Option("row_wise", False, "an arc for each row, instead of one for the whole tensor"))


def UNIT(options: Mapping[str, Any]) -> str:
    """Rows stay whole where each has its own arc."""
    return "row" if options["row_wise"] else "element"


def _share(tensor: Tensor) -> float:
    first, second = tensor.each["weight"]
    return float(second / (first + second)) if first + second else 0.5


def prepare(tensor: Tensor) -> np.ndarray | None:
    """The coefficients of the two, unless each row has its own."""
    return None if tensor.options["row_wise"] else _sphere.slerp(tensor.gram(), _share(tensor), _sphere.PARALLEL)


def combine(tensor: Tensor, block: Block, coefficients: np.ndarray | None) -> np.ndarray:
    """Their combination."""
    if coefficients is not None:
        kernels.weighted_sum(block.values, coefficients, block.out)
        return block.out
    rows = block.values.reshape(2, -1, tensor.row).astype(np.float64)
    out = block.out.reshape(rows.shape[1:])
    for i in range(rows.shape[1]):
        pair = rows[:, i]
        found = _sphere.slerp(np.array([[a @ b for b in pair] for a in pair]), _share(tensor), _sphere.PARALLEL)
        out[i] = found[0] * pair[0] + found[1] * pair[1]
    return block.out
