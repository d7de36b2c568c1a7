"""Dropping elements at random (DARE), and the factors that make up for what is dropped.

The random number of an element depends on the seed, the input's content, the tensor's name and the element's place
alone: not on threads, pieces or devices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from merges.engine import kernels, steps
from merges.engine.tensor_task import Block, TensorTask
from vectors.options import Option

RESCALE = Option(
    "rescale",
    "density",
    "what survives is divided by its chance (density), stretched to the sum before (l1), or left",
    choices=("density", "l1", "none"),
)


def drop(delta: np.ndarray, key: int, density: float) -> np.ndarray:
    """A whole delta of which each element stays with the chance `density`, and is zero otherwise."""
    places = np.arange(delta.size).reshape(delta.shape)
    return steps.random_drop(delta, places, int(key), float(density))


def keys(task: TensorTask) -> np.ndarray:
    """Where each input's random numbers come from, [inputs] uint64."""
    return np.array([source.key for source in task.inputs], np.uint64)


def factors(task: TensorTask) -> np.ndarray:
    """What each delta is multiplied by after the drop, by the option `rescale`, [inputs] float64."""
    density = task.each["density"]
    if task.options["rescale"] == "density":
        return 1.0 / density
    if task.options["rescale"] == "none":
        return np.ones(len(density))
    return stretch(task, lambda block: kernels.drop(block.values, keys(task), density, block.start))


def stretch(task: TensorTask, zero: Callable[[Block], None]) -> np.ndarray:
    """The sum of magnitudes before over that after `zero(block)`, [inputs] float64; 1 where nothing is left."""

    def part(block: Block) -> np.ndarray:
        lengths = np.empty((2, len(task.inputs)))
        kernels.length(block.values, lengths[0])
        zero(block)
        kernels.length(block.values, lengths[1])
        return lengths

    before, after = task.sum(part)
    return np.divide(before, after, out=np.ones_like(before), where=after > 0)
