"""DELLA without sign election: drop the smaller elements of each row more often, rescale, sum.

The paper divides kept elements by their probability (rounded to float32 here); `rescale: l1` is mergekit's.
"""

from __future__ import annotations

import numpy as np

from merges.engine.method import MergeMethod
from merges.engine.steps import weighted_sum
from merges.engine.tensor_task import Block, TensorTask
from merges.methods import _combining, _magnitude_drop
from merges.methods._options import NORMALIZE, SCALE, density, weight
from merges.methods._random_drop import RESCALE


def della_linear(
    deltas: np.ndarray, density: np.ndarray, weights: np.ndarray, keys: np.ndarray, epsilon: np.ndarray
) -> np.ndarray:
    """The drop of DELLA (Deep et al. 2024, arXiv:2406.11617), then a weighted sum: the merged delta, float64.

    `deltas` [inputs, rows, columns] float32; `density`, `weights`, `epsilon` [inputs] float64; `keys` [inputs] uint64.
    """
    dropped = deltas.reshape(len(deltas), -1).copy()
    _magnitude_drop.drop(dropped, deltas.shape[-1], keys, density, epsilon)
    return weighted_sum(list(dropped), weights).reshape(deltas.shape[1:])


def combine(task: TensorTask, block: Block, factors: np.ndarray | None) -> np.ndarray:
    """The merged delta of one piece."""
    _magnitude_drop.drop_block(task, block, divide=task.options["rescale"] == "density")
    return block.apply(_combining.weighted_sum(task, factors))


METHOD = MergeMethod(
    name="della_linear",
    summary="drop the smaller elements of each row more often, rescale, sum",
    source="Deep et al. 2024, arXiv:2406.11617",
    options=(weight(), density(0.5), SCALE, NORMALIZE, _magnitude_drop.EPSILON, RESCALE),
    space="delta",
    base="needed",
    unit="row",
    prepare=_magnitude_drop.factors,
    combine=combine,
    problems_of=_magnitude_drop.problems_of,
)
