"""Task singular vectors (TSV-M): the strongest directions of each delta, made orthogonal to each other.

The top 1/N of the singular components of each of the N deltas are kept; the left and the right singular vectors of all
N are each replaced by the nearest orthonormal set (the Procrustes solution). Other parameters than
matrices are averaged.
"""

from __future__ import annotations

import numpy as np

from merges.engine.method import MergeMethod
from merges.engine.tensor_task import Block, TensorTask
from merges.methods._options import SCALE


def nearest_orthonormal(columns: np.ndarray) -> np.ndarray:
    """The orthonormal columns nearest to the given ones, both [n, k]: P Q of the singular value decomposition P S Q."""
    left, _, right = np.linalg.svd(columns, full_matrices=False)
    return left @ right


def combine(task: TensorTask, block: Block, _prepared: None) -> np.ndarray:
    """lambda * U S V^T with orthonormalised U and V."""
    deltas = block.values.reshape(len(block.values), *task.shape).astype(np.float64)
    if len(task.shape) != 2 or min(task.shape) < len(deltas):
        return task.options["lambda"] * deltas.mean(0)
    rank = min(task.shape) // len(deltas)
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = nearest_orthonormal(np.concatenate([u[:, :rank] for u, _, _ in parts], 1))
    right = nearest_orthonormal(np.concatenate([v[:rank].T for _, _, v in parts], 1))
    values = np.concatenate([s[:rank] for _, s, _ in parts])
    return task.options["lambda"] * ((left * values) @ right.T)


METHOD = MergeMethod(
    name="tsv",
    summary="the strongest singular directions of each delta, made orthogonal",
    source="Gargiulo et al. 2024, arXiv:2412.00081, algorithm 1",
    options=(SCALE,),
    space="delta",
    base="needed",
    unit="tensor",
    combine=combine,
)
