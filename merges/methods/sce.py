"""SCE: select the elements that differ most between the deltas, calculate weights, erase minority signs."""

from __future__ import annotations

import numpy as np

from merges.engine.fused import Elementwise
from merges.engine.method import MergeMethod
from merges.engine.selection import magnitudes
from merges.engine.steps import disjoint_mean, elect_signs
from merges.engine.tensor_task import Block, TensorTask
from merges.methods._options import SCALE
from vectors.registry.options import Option, retained_count


def sce(deltas: np.ndarray, select_topk: float) -> np.ndarray:
    """SCE (Wan et al. 2024, FuseChat, arXiv:2408.07990, section 3.3): the merged delta, float64.

    `deltas` [inputs, ...] float32; `select_topk` is the share of the varying elements that is kept.
    """
    flat = deltas.reshape(len(deltas), -1)
    differences = variance(flat)
    varying = np.sort(differences[differences > 0])[::-1]
    least = varying[retained_count(select_topk, varying.size) - 1] if select_topk < 1 and varying.size else 0
    selected = flat * (differences >= least)
    weights = shares(np.square(selected, dtype=np.float64).sum(1))
    signs = elect_signs(list(selected), votes=np.ones(len(selected)))
    return disjoint_mean(list(selected), weights, signs).reshape(deltas.shape[1:])


def variance(values: np.ndarray) -> np.ndarray:
    """The variance of each element across the inputs: [count] float32 from [inputs, count]."""
    return values.var(0, dtype=np.float64).astype(np.float32)


def shares(energy: np.ndarray) -> np.ndarray:
    """Each input's share of the energy (sum of squares), [inputs]; equal shares if there is none."""
    return energy / energy.sum() if energy.sum() > 0 else np.full(len(energy), 1 / len(energy))


def _row_of_variances(block: Block) -> np.ndarray:
    return variance(block.values)[None]


def _select(block: Block, least: float) -> None:
    if least > 0:
        np.multiply(block.values, variance(block.values) >= least, out=block.values)


def prepare(task: TensorTask) -> tuple[float, np.ndarray]:
    """The least variance that is kept (0: all), and the weights: each input's share of the selected energy."""
    least = 0.0
    if task.options["select_topk"] < 1:
        varying = int(task.sum(lambda block: np.count_nonzero(variance(block.values))))
        if varying:
            rank = retained_count(task.options["select_topk"], varying)
            least = float(magnitudes([task], [[rank]], _row_of_variances)[0, 0])

    def energy(block: Block) -> np.ndarray:
        _select(block, least)
        return np.square(block.values, dtype=np.float64).sum(1)

    return least, shares(task.sum(energy))


def _erase(task: TensorTask, weights: np.ndarray) -> Elementwise:
    """The weighted mean of the values that agree with the sign of the sum."""
    return Elementwise(weights, votes=np.ones(len(weights)), mean=True, scale=task.options["lambda"])


def elementwise(task: TensorTask, prepared: tuple[float, np.ndarray]) -> Elementwise | None:
    """SCE in the compiled pass, if all elements are selected; else None."""
    least, weights = prepared
    return None if least > 0 else _erase(task, weights)


def combine(task: TensorTask, block: Block, prepared: tuple[float, np.ndarray]) -> np.ndarray:
    """SCE for the selected elements of one piece."""
    least, weights = prepared
    _select(block, least)
    return block.apply(_erase(task, weights))


METHOD = MergeMethod(
    name="sce",
    summary="select by variance, weight by energy, erase minority signs",
    source="Wan et al. 2024, FuseChat, arXiv:2408.07990, section 3.3",
    options=(
        Option("select_topk", 1.0, "the share of the varying elements that is kept", low=0, high=1, open_low=True),
        SCALE,
    ),
    space="delta",
    base="needed",
    prepare=prepare,
    elementwise=elementwise,
    combine=combine,
)
