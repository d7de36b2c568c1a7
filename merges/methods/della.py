"""DELLA: drop the smaller elements of each row more often, rescale, elect signs.

The paper divides kept elements by their probability (rounded to float32 here); `rescale: l1` is mergekit's.
"""

from __future__ import annotations

import numpy as np

from merges.engine.method import MergeMethod
from merges.engine.steps import disjoint_mean, elect_signs
from merges.engine.tensor_task import Block, TensorTask
from merges.methods import _combining, _magnitude_drop
from merges.methods._options import COMBINE, ELECT, SCALE, ZERO, density, weight
from merges.methods._random_drop import RESCALE


def della(
    deltas: np.ndarray, density: np.ndarray, weights: np.ndarray, keys: np.ndarray, epsilon: np.ndarray
) -> np.ndarray:
    """DELLA-Merging (Deep et al. 2024, arXiv:2406.11617): the merged delta, float64.

    `deltas` [inputs, rows, columns] float32; `density`, `weights`, `epsilon` [inputs] float64; `keys` [inputs] uint64.
    """
    dropped = deltas.reshape(len(deltas), -1).copy()
    _magnitude_drop.drop(dropped, deltas.shape[-1], keys, density, epsilon)
    signs = elect_signs(list(dropped), votes=np.sign(weights))
    return disjoint_mean(list(dropped), weights, signs).reshape(deltas.shape[1:])


def combine(task: TensorTask, block: Block, factors: np.ndarray | None) -> np.ndarray:
    """The merged delta of one piece."""
    _magnitude_drop.drop_block(task, block, divide=task.options["rescale"] == "density")
    return block.apply(_combining.disjoint_mean(task, factors))


METHOD = MergeMethod(
    name="della",
    summary="drop the smaller elements of each row more often, rescale, elect signs",
    source="Deep et al. 2024, arXiv:2406.11617",
    options=(weight(), density(0.5), SCALE, ELECT, COMBINE, ZERO, _magnitude_drop.EPSILON, RESCALE),
    space="delta",
    base="needed",
    unit="row",
    prepare=_magnitude_drop.factors,
    combine=combine,
    problems_of=_magnitude_drop.problems_of,
)
