"""SCE: select the elements that differ most between the deltas, calculate weights, erase the minority's signs."""

from __future__ import annotations

import numpy as np

from merges.engine.fused import Fusion
from merges.engine.selection import magnitudes
from merges.engine.tensor_task import Block, TensorTask
from vectors.options import SCALE, Option, kept

SUMMARY = "select by variance, weight by energy, erase minority signs"
SOURCE = "Wan et al. 2024, FuseChat, arXiv:2408.07990, section 3.3"
SPACE, BASE, INPUTS = "delta", "needed", (1, None)
OPTIONS = (
    Option("select_topk", 1.0, "the part of the elements that vary which is kept", low=0, high=1, open_low=True),
    SCALE,
)


def _variance(block: Block) -> np.ndarray:
    """The variance across inputs, [1, count] float32."""
    return block.values.var(0, dtype=np.float64).astype(np.float32)[None]


def _select(block: Block, least: float) -> None:
    if least > 0:
        np.multiply(block.values, _variance(block)[0] >= least, out=block.values)


def prepare(tensor: TensorTask) -> tuple[float, np.ndarray]:
    """The least variance that is kept (0: all), and the weights: each input's share of the energy that is left."""
    least = 0.0
    if tensor.options["select_topk"] < 1:
        vary = int(tensor.sum(lambda block: np.count_nonzero(_variance(block))))
        if vary:
            rank = kept(tensor.options["select_topk"], vary)
            least = float(magnitudes([tensor], [[rank]], _variance)[0, 0])

    def energy(block: Block) -> np.ndarray:
        _select(block, least)
        return np.square(block.values, dtype=np.float64).sum(1)

    found = tensor.sum(energy)
    return least, found / found.sum() if found.sum() > 0 else np.full(len(found), 1 / len(found))


def _erase(tensor: TensorTask, weights: np.ndarray) -> Fusion:
    """The weighted mean of what agrees with the sign of the sum."""
    return Fusion(weights, votes=np.ones(len(weights)), mean=True, scale=tensor.options["lambda"])


def fusion(tensor: TensorTask, prepared: tuple[float, np.ndarray]) -> Fusion | None:
    """All of it, where nothing is left out."""
    least, weights = prepared
    return None if least > 0 else _erase(tensor, weights)


def combine(tensor: TensorTask, block: Block, prepared: tuple[float, np.ndarray]) -> np.ndarray:
    """The same for what is selected."""
    least, weights = prepared
    _select(block, least)
    return block.apply(_erase(tensor, weights))
