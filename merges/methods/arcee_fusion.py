"""Arcee Fusion: the first model with the most important elements of the second.

Importance is |x - b| times the divergence of the row, KL(softmax(x) | softmax(b)); elements at or above the
median plus 1.5 interquartile ranges are taken. The quartiles are exact (mergekit samples above a million elements).
"""

from __future__ import annotations

import numpy as np

from merges.engine.method import MergeMethod
from merges.engine.selection import magnitudes
from merges.engine.tensor_task import Block, TensorTask


def importance(task: TensorTask, block: Block) -> np.ndarray:
    """The importance of each element, [1, count] float32."""
    b, x = block.values.reshape(2, -1, task.row).astype(np.float64)
    log_p, log_q = _log_softmax(x), _log_softmax(b)
    divergence = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(1, keepdims=True), 0)
    return (np.abs(x - b) * divergence).astype(np.float32).reshape(1, -1)


def _log_softmax(rows: np.ndarray) -> np.ndarray:
    shifted = rows - rows.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def prepare(task: TensorTask) -> float:
    """The median plus 1.5 interquartile ranges; a quartile between two elements is the lower one, as in mergekit."""
    ranks = [task.count - int(share * (task.count - 1)) for share in (0.25, 0.5, 0.75)]
    first, middle, third = magnitudes([task], [ranks], lambda block: importance(task, block))[0]
    return float(middle + np.float32(1.5) * (third - first))


def combine(task: TensorTask, block: Block, least: float) -> np.ndarray:
    """The elements of the second model whose importance is at least `least`, else those of the first."""
    taken = importance(task, block)[0] >= least
    return np.where(taken, block.values[1], block.values[0])


METHOD = MergeMethod(
    name="arcee_fusion",
    summary="the first model, with the most important elements of the second",
    source="mergekit's arcee_fusion (Arcee AI 2025)",
    space="weight",
    base="unused",
    inputs=(2, 2),
    symmetric=False,
    unit="row",
    prepare=prepare,
    combine=combine,
)
