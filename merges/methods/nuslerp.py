"""Spherical interpolation by weights: t = w2 / (w1 + w2), of two models or, with a base, of their deltas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from merges.engine.fused import Elementwise
from merges.engine.method import MergeMethod
from merges.engine.tensor_task import Block, TensorTask, Unit
from merges.methods import _sphere
from merges.methods._options import weight
from vectors.registry.options import Option


def unit(options: Mapping[str, Any]) -> Unit:
    """Pieces are whole rows if each row or column has its own arc."""
    return "element" if options["along"] == "tensor" else "row"


def _share(task: TensorTask) -> float:
    first, second = task.each["weight"]
    return float(second / (first + second)) if first + second else 0.5


def _coefficients(products: np.ndarray, share: float) -> np.ndarray:
    """The coefficients [2, lines], from the inner products [2, 2, lines] of each line's pair."""
    return np.stack([_sphere.slerp(gram, share, _sphere.PARALLEL) for gram in np.moveaxis(products, -1, 0)], 1)


def _rows(task: TensorTask, block: Block) -> np.ndarray:
    return block.values.reshape(2, -1, task.row).astype(np.float64)


def prepare(task: TensorTask) -> np.ndarray | None:
    """The coefficients of the two inputs, [2] or [2, columns]; None if each row has its own."""
    if task.options["along"] == "tensor":
        return _sphere.slerp(task.gram(), _share(task), _sphere.PARALLEL)
    if task.options["along"] == "rows" or len(task.shape) < 2:
        return None

    def products(block: Block) -> np.ndarray:
        rows = _rows(task, block)
        return np.einsum("aij,bij->abj", rows, rows)

    return _coefficients(task.sum(products), _share(task))


def elementwise(task: TensorTask, coefficients: np.ndarray | None) -> Elementwise | None:
    """The combination of the inputs, if there is one arc for the whole tensor."""
    return Elementwise(coefficients) if coefficients is not None and task.options["along"] == "tensor" else None


def combine(task: TensorTask, block: Block, coefficients: np.ndarray | None) -> np.ndarray:
    """The combination of the inputs, with an arc for each row or column."""
    rows = _rows(task, block)
    if coefficients is None:
        coefficients = _coefficients(np.einsum("aij,bij->abi", rows, rows), _share(task))[..., None]
    else:
        coefficients = coefficients[:, None]
    return (coefficients * rows).sum(0)


METHOD = MergeMethod(
    name="nuslerp",
    summary="along the arc between two models, or their deltas, by weight",
    source="mergekit's nuslerp; Shoemake 1985",
    options=(
        weight(),
        Option(
            "along",
            "tensor",
            "one arc for the whole tensor, or one for each of its rows or columns",
            choices=("tensor", "rows", "columns"),
        ),
    ),
    space="either",
    base="optional",
    inputs=(2, 2),
    symmetric=False,
    unit=unit,
    prepare=prepare,
    combine=combine,
    elementwise=elementwise,
)
