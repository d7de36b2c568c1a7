"""Dropping elements at random (DARE), and the factors that compensate for it.

The random number of an element depends only on the seed, the content of the input, the name of the tensor and the
position of the element: not on threads, pieces or devices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from merges.engine import kernels, steps
from merges.engine.tensor_task import Block, TensorTask
from vectors.registry.options import Option

RESCALE = Option(
    "rescale",
    "density",
    "kept elements are divided by their probability (density), scaled to the L1 norm before (l1), or unchanged (none)",
    choices=("density", "l1", "none"),
)


def drop(delta: np.ndarray, key: int, density: float) -> np.ndarray:
    """The delta (float32, any shape), each element kept with probability `density`, else zero; `key` has 64 bits."""
    positions = np.arange(delta.size).reshape(delta.shape)
    return steps.random_drop(delta, positions, int(key), float(density))


def keys(task: TensorTask) -> np.ndarray:
    """The random key of each input, [inputs] uint64."""
    return np.array([source.key for source in task.inputs], np.uint64)


def factors(task: TensorTask) -> np.ndarray:
    """The factor of each delta after the drop, by the option `rescale`, [inputs] float64."""
    density = task.each["density"]
    if task.options["rescale"] == "density":
        return inverse(density)
    if task.options["rescale"] == "none":
        return np.ones(len(density))
    return stretch(task, lambda block: kernels.drop(block.values, keys(task), density, block.start))


def inverse(density: np.ndarray) -> np.ndarray:
    """1 / density, by which DARE rescales what is left; 1 where nothing is. float64, of the same shape."""
    share = np.asarray(density, dtype=np.float64)
    return np.divide(1.0, share, out=np.ones_like(share), where=share > 0)


def stretch(task: TensorTask, zero: Callable[[Block], None]) -> np.ndarray:
    """The ratio of the L1 norms before and after `zero(block)`, [inputs] float64; 1 where all elements become zero."""

    def part(block: Block) -> np.ndarray:
        norms = np.empty((2, len(task.inputs)))
        kernels.l1_norms(block.values, norms[0])
        zero(block)
        kernels.l1_norms(block.values, norms[1])
        return norms

    before, after = task.sum(part)
    return np.divide(before, after, out=np.ones_like(before), where=after > 0)
