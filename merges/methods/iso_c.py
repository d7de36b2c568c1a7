"""Iso-C: the sum of the deltas with all singular values made equal, so that no task dominates.

Other parameters than matrices are averaged.
"""

from __future__ import annotations

import numpy as np

from merges.engine.method import MergeMethod
from merges.engine.tensor_task import Block, TensorTask
from merges.methods._options import SCALE


def combine(task: TensorTask, block: Block, _prepared: None) -> np.ndarray:
    """lambda * mean(S) U V^T, of the singular value decomposition of the sum."""
    deltas = block.values.reshape(len(block.values), *task.shape).astype(np.float64)
    if len(task.shape) != 2:
        return task.options["lambda"] * deltas.mean(0)
    left, values, right = np.linalg.svd(deltas.sum(0), full_matrices=False)
    return task.options["lambda"] * values.mean() * (left @ right)


METHOD = MergeMethod(
    name="iso_c",
    summary="the sum of the deltas with all singular values made equal",
    source="Marczak et al. 2025, arXiv:2502.04959, section 4",
    options=(SCALE,),
    space="delta",
    base="needed",
    unit="tensor",
    combine=combine,
)
