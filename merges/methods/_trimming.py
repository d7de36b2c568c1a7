"""Trimming by magnitude: exact limits of the magnitudes that are kept, for each tensor or over the whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from merges.engine import kernels
from merges.engine.selection import magnitudes
from merges.engine.tensor_task import TensorTask
from merges.methods import _random_drop
from vectors.registry.options import Option, retained_count

RESCALE = Option(
    "rescale",
    "none",
    "kept elements are not changed (none), or scaled to the L1 norm before (l1)",
    choices=("none", "l1"),
)


class Trimming(NamedTuple):
    """For each input, the least and greatest magnitudes that are kept, and the factor of these: [inputs] each."""

    low: np.ndarray  # float32
    high: np.ndarray  # float32
    factors: np.ndarray | None  # float64; None: no scaling


def prepare(task: TensorTask) -> Trimming:
    """The limits of each input by its density (and gamma), and its factor if the option `rescale` is l1."""
    low, high = limits(task)
    factors = None
    if task.options["rescale"] == "l1":
        factors = _random_drop.stretch(task, lambda block: kernels.trim(block.values, low, high))
    return Trimming(low, high, factors)


def ranks(total: int, density: float, gamma: float = 0.0) -> tuple[int, int]:
    """The first and the last rank, of `total` magnitudes, that are kept; rank 1 is the greatest.

    A share `gamma`, the greatest, is dropped (less if too few would be left), and the next share `density` of the total
    is kept; for a density of 0 the last rank is below the first.
    """
    count = retained_count(density, total) if density else 0
    dropped = min(int(gamma * total), total - count)
    return dropped + 1, dropped + count


def limits_of(delta: np.ndarray, density: float, gamma: float = 0.0) -> tuple[float, float]:
    """The least and the greatest magnitude of a whole delta that are kept, by sorting; `limits` gives the same."""
    first, last = ranks(delta.size, density, gamma)
    if last < first:
        return math.inf, math.inf
    greatest_first = np.sort(np.abs(delta), axis=None)[::-1]
    return greatest_first[last - 1], greatest_first[first - 1] if first > 1 else math.inf


def limits(task: TensorTask) -> tuple[np.ndarray, np.ndarray]:
    """For each input, the least and the greatest magnitude that are kept, [inputs] float32 each.

    Elements that tie with the last one are kept too, as in the code of the TIES paper. With `scope: global` all tensors
    of the model are counted together.
    """
    if not task.scope:
        return _limits(task, (task,))
    with task.lock:  # the first tensor of the scope computes the limits for all
        if "limits" not in task.shared:
            task.shared["limits"] = _limits(task, task.scope)
        return task.shared["limits"]


def _limits(task: TensorTask, tasks: Sequence[TensorTask]) -> tuple[np.ndarray, np.ndarray]:
    total = sum(t.count for t in tasks)
    gammas = task.each.get("gamma", np.zeros(len(task.inputs)))
    wanted = [ranks(total, float(d), float(g)) for d, g in zip(task.each["density"], gammas, strict=True)]
    low, high = np.zeros(len(wanted), np.float32), np.full(len(wanted), np.inf, np.float32)
    low[[last < first for first, last in wanted]] = np.inf  # nothing is kept of a density of 0
    trimmed = [m for m, (first, last) in enumerate(wanted) if first <= last and (first > 1 or last < total)]
    if trimmed:
        # The first rank is needed only with gamma, and each rank costs time.
        pairs = [wanted[m] if wanted[m][0] > 1 else wanted[m][1:] * 2 for m in trimmed]
        every = len(trimmed) == len(wanted)
        ends = magnitudes(tasks, pairs, None if every else lambda block: block.values[trimmed])
        low[trimmed] = ends[:, 1]
        for m, greatest in zip(trimmed, ends[:, 0], strict=True):
            high[m] = greatest if wanted[m][0] > 1 else np.inf
    return low, high
