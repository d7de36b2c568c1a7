"""What the methods that drop elements at random share."""

from __future__ import annotations

import numpy as np

from merges.engine import kernels
from merges.engine.tensor_task import Block, TensorTask
from vectors.options import Option

RESCALE = Option(
    "rescale",
    "density",
    "what survives is divided by its chance (density), stretched to the sum before (l1), or left",
    choices=("density", "l1", "none"),
)  # fmt: skip


def keys(tensor: TensorTask) -> np.ndarray:
    """Where each input's random numbers come from, uint64: its content, the seed, and the tensor's name."""
    return np.array([source.key for source in tensor.inputs], np.uint64)


def factors(tensor: TensorTask) -> np.ndarray:
    """What the deltas are multiplied by after the Bernoulli mask of DARE, [inputs] float64."""
    chance = tensor.each["density"]
    if tensor.options["rescale"] == "density":
        return 1.0 / chance
    if tensor.options["rescale"] == "none":
        return np.ones(len(chance))
    return lengths(tensor, lambda block: kernels.drop(block.values, keys(tensor), chance, block.start))


def lengths(tensor: TensorTask, drop) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Sum of magnitudes before over that after `drop(block)`, [inputs]; 1 where nothing is left."""

    def part(block: Block) -> np.ndarray:
        found = np.empty((2, len(tensor.inputs)))
        kernels.length(block.values, found[0])
        drop(block)
        kernels.length(block.values, found[1])
        return found

    before, after = tensor.sum(part)
    return np.divide(before, after, out=np.ones_like(before), where=after > 0)
