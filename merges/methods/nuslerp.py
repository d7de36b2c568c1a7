"""Spherical interpolation by weights: t = w2 / (w1 + w2), of two models or, with a base, of their deltas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from merges.engine.fused import Fusion
from merges.engine.tensor_task import Block, TensorTask
from merges.methods import _sphere
from vectors.options import Option, weight

SUMMARY = "along the arc between two models, or their deltas, by weight"
SOURCE = "mergekit's nuslerp; Shoemake 1985"
SPACE, BASE, INPUTS, SYMMETRIC = "either", "optional", (2, 2), False
OPTIONS = (
    weight(),
    Option(
        "along",
        "tensor",
        "one arc for the whole tensor, or one for each of its rows or columns",
        choices=("tensor", "rows", "columns"),
    ),
)


def UNIT(options: Mapping[str, Any]) -> str:
    """Rows stay whole where rows or columns have arcs of their own."""
    return "element" if options["along"] == "tensor" else "row"


def _share(tensor: TensorTask) -> float:
    first, second = tensor.each["weight"]
    return float(second / (first + second)) if first + second else 0.5


def _coefficients(products: np.ndarray, share: float) -> np.ndarray:
    """[2, lines], from the products [2, 2, lines] of each line's pair."""
    return np.stack([_sphere.slerp(gram, share, _sphere.PARALLEL) for gram in np.moveaxis(products, -1, 0)], 1)


def _rows(tensor: TensorTask, block: Block) -> np.ndarray:
    return block.values.reshape(2, -1, tensor.row).astype(np.float64)


def prepare(tensor: TensorTask) -> np.ndarray | None:
    """The coefficients of the two, [2] or [2, columns]; None where each row has its own."""
    if tensor.options["along"] == "tensor":
        return _sphere.slerp(tensor.gram(), _share(tensor), _sphere.PARALLEL)
    if tensor.options["along"] == "rows" or len(tensor.shape) < 2:
        return None

    def products(block: Block) -> np.ndarray:
        rows = _rows(tensor, block)
        return np.einsum("aij,bij->abj", rows, rows)

    return _coefficients(tensor.sum(products), _share(tensor))


def fusion(tensor: TensorTask, coefficients: np.ndarray | None) -> Fusion | None:
    """Their combination, with one arc for all."""
    return Fusion(coefficients) if coefficients is not None and tensor.options["along"] == "tensor" else None


def combine(tensor: TensorTask, block: Block, coefficients: np.ndarray | None) -> np.ndarray:
    """Their combination, with an arc for each line."""
    rows = _rows(tensor, block)
    if coefficients is None:
        coefficients = _coefficients(np.einsum("aij,bij->abi", rows, rows), _share(tensor))[..., None]
    else:
        coefficients = coefficients[:, None]
    return (coefficients * rows).sum(0)
