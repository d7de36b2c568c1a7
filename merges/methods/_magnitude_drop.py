"""MAGPRUNE, the random drop of DELLA (Deep et al. 2024, arXiv:2406.11617): larger magnitudes are likelier to be kept.

The probability of keeping an element is linear in the rank of the magnitude within its row, from density - epsilon
for the smallest to density + epsilon for the greatest.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from merges.engine.floats import OPTIONS as COMPILED
from merges.engine.kernels import GOLDEN, mix
from merges.engine.tensor_task import Block, TensorTask
from merges.methods import _random_drop
from vectors.registry.options import Option

EPSILON = Option(
    "epsilon",
    0.15,
    "the probability of keeping an element ranges from density - epsilon to density + epsilon",
    each=True,
    low=0,
    high=0.5,
)


@njit(**COMPILED)
def _drop(values, order, row, keys, density, epsilon, start, divide):  # type: ignore[no-untyped-def]
    for m in range(values.shape[0]):
        for first in range(0, values.shape[1], row):
            for rank in range(row):
                i = first + order[m, first + rank]
                share = rank / (row - 1) if row > 1 else 0.5
                chance = density[m] - epsilon[m] + 2 * epsilon[m] * share
                bits = mix(keys[m] + np.uint64(start + i + 1) * GOLDEN)
                drawn = np.float64(np.int64(bits >> np.uint64(11))) * (1.0 / 9007199254740992.0)
                if not drawn < chance:
                    values[m, i] = np.float32(0)
                elif divide:
                    values[m, i] = np.float32(values[m, i] / chance)


def drop(
    values: np.ndarray, row: int, keys: np.ndarray, density: np.ndarray, epsilon: float | np.ndarray,
    *, start: int = 0, divide: bool = True,
) -> None:  # fmt: skip
    """Drop in place. `values` [inputs, count] float32 are whole rows of `row` elements, from element `start` on.

    `keys` (uint64), `density` and `epsilon` are [inputs]; a density of 1 keeps everything, one of 0 nothing. Kept
    elements are divided by their probability, rounded to float32, unless `divide` is False. Equal magnitudes rank in
    the order of their positions.
    """
    rows = np.abs(values).reshape(len(values), -1, row)
    order = np.argsort(rows, axis=2, kind="stable").reshape(values.shape)
    certain = (np.asarray(density) >= 1) | (np.asarray(density) <= 0)
    _drop(values, order, row, keys, density, np.where(certain, 0.0, epsilon), start, divide)


def drop_block(task: TensorTask, block: Block, *, divide: bool) -> None:
    """`drop` for one piece of a tensor, in place."""
    drop(
        block.values,
        task.row,
        _random_drop.keys(task),
        task.each["density"],
        task.each["epsilon"],
        start=block.start,
        divide=divide,
    )


def factors(task: TensorTask) -> np.ndarray | None:
    """With `rescale: l1`, the factors of the deltas, [inputs] float64; else None."""
    if task.options["rescale"] != "l1":
        return None
    return _random_drop.stretch(task, lambda block: drop_block(task, block, divide=False))


def problems_of(task: TensorTask) -> list[str]:
    """Refuse probabilities outside (0, 1]."""
    pairs = sorted(set(zip(task.each["density"].tolist(), task.each["epsilon"].tolist(), strict=True)))
    return [
        f"density {d:g} with epsilon {e:g} gives probabilities {d - e:g} to {d + e:g}, outside (0, 1]"
        for d, e in pairs
        if 0 < d < 1 and (d - e <= 0 or d + e > 1)
    ]
