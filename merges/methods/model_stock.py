"""Model Stock: interpolation from the base towards the mean of the fine-tunes, by the agreement of their deltas.

b + t * mean(d) with t = N c / (1 + (N - 1) c), c the mean cosine between deltas (the paper's equation 4 for N = 2, and
its appendix for more). Deltas that do not agree (c <= 0) give t = 0, the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from merges.engine.fused import Elementwise
from merges.engine.method import MergeMethod
from merges.engine.tensor_task import Block, TensorTask, Unit
from vectors.registry.options import Option


def unit(options: Mapping[str, Any]) -> Unit:
    """Pieces are whole rows if each row has its own ratio."""
    return "row" if options["filter_wise"] else "element"


def ratio(gram: np.ndarray) -> float:
    """t, from the inner products of the deltas, [inputs, inputs]."""
    count = len(gram)
    norms = np.sqrt(np.diag(gram))
    lengths = np.outer(norms, norms)
    cosines = np.divide(gram, lengths, out=np.zeros_like(gram), where=lengths > 0)
    cosine = float(cosines[np.triu_indices(count, 1)].mean())
    return min(count * cosine / (1 + (count - 1) * cosine), 1.0) if cosine > 0 else 0.0


def prepare(task: TensorTask) -> float | None:
    """t, or None if each row has its own."""
    return None if task.options["filter_wise"] else ratio(task.gram())


def elementwise(task: TensorTask, t: float | None) -> Elementwise | None:
    """t times the mean of the deltas."""
    count = len(task.inputs)
    return None if t is None else Elementwise(np.full(count, t / count))


def combine(task: TensorTask, block: Block, _t: None) -> np.ndarray:
    """t times the mean of the deltas, with a t for each row."""
    count = len(block.values)
    rows = block.values.reshape(count, -1, task.row).astype(np.float64)
    products = np.einsum("aij,bij->iab", rows, rows)
    ratios = np.array([ratio(gram) for gram in products])
    return ratios[:, None] * rows.mean(0)


METHOD = MergeMethod(
    name="model_stock",
    summary="from the base towards the mean of the fine-tunes, by the agreement of their deltas",
    source="Jang et al. 2024, arXiv:2403.19522",
    options=(Option("filter_wise", False, "a ratio for each row, instead of one for the whole tensor"),),
    space="delta",
    base="needed",
    inputs=(2, None),
    unit=unit,
    prepare=prepare,
    combine=combine,
    elementwise=elementwise,
)
