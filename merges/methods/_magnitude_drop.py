"""MAGPRUNE, the random drop of DELLA: within a row, what is greater is likelier to stay."""

from __future__ import annotations

import numpy as np
from numba import njit

from merges.engine.floats import OPTIONS as COMPILED
from merges.engine.kernels import GOLDEN, mix
from merges.engine.tensor_task import Block, TensorTask
from merges.methods import _drop
from vectors.options import Option

EPSILON = Option(
    "epsilon", 0.15, "the chance of staying goes from density - epsilon to density + epsilon", low=0, high=0.5
)


@njit(**COMPILED)
def _prune(values, order, row, keys, density, epsilon, start, divide):  # type: ignore[no-untyped-def]
    for m in range(values.shape[0]):
        for first in range(0, values.shape[1], row):
            for rank in range(row):
                i = first + order[m, first + rank]
                share = rank / (row - 1) if row > 1 else 0.5
                chance = density[m] - epsilon + 2 * epsilon * share
                bits = mix(keys[m] + np.uint64(start + i + 1) * GOLDEN)
                drawn = np.float64(np.int64(bits >> np.uint64(11))) * (1.0 / 9007199254740992.0)
                if not drawn < chance:
                    values[m, i] = np.float32(0)
                elif divide:
                    values[m, i] = np.float32(values[m, i] / chance)


def prune(tensor: TensorTask, block: Block, *, divide: bool) -> None:
    """Drop in place. The chance is linear in the rank within the row, ties in the order of their places."""
    values = block.values
    rows = np.abs(values).reshape(len(values), -1, tensor.row)
    order = np.argsort(rows, axis=2, kind="stable").reshape(values.shape)
    _prune(
        values,
        order,
        tensor.row,
        _drop.keys(tensor),
        tensor.each["density"],
        float(tensor.options["epsilon"]),
        block.start,
        divide,
    )


def factors(tensor: TensorTask) -> np.ndarray | None:
    """With `rescale: l1`, what the deltas are multiplied by; else None."""
    if tensor.options["rescale"] != "l1":
        return None
    return _drop.lengths(tensor, lambda block: prune(tensor, block, divide=False))


def check(tensor: TensorTask) -> list[str]:
    """Chances must lie in (0, 1]."""
    epsilon = tensor.options["epsilon"]
    bad = sorted({float(d) for d in tensor.each["density"] if d - epsilon <= 0 or d + epsilon > 1})
    return [
        f"density {d:g} with epsilon {epsilon:g} leaves (0, 1]: chances go from {d - epsilon:g} to {d + epsilon:g}"
        for d in bad
    ]
