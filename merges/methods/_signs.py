"""What the methods that trim deltas and elect signs share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from merges.engine import kernels
from merges.engine.fused import Fusion
from merges.engine.selection import magnitudes
from merges.engine.tensor_task import TensorTask
from merges.methods import _drop
from vectors.options import Option, kept

RESCALE = Option(
    "rescale",
    "none",
    "what survives is left as it is (none), or stretched to the sum of magnitudes before (l1)",
    choices=("none", "l1"),
)


def trimming(tensor: TensorTask) -> dict[str, np.ndarray | None]:
    """Between which magnitudes, `low` and `high`, an element stays, and what it is multiplied by then, `factors`."""
    low, high = limits(tensor)
    factors = None
    if tensor.options["rescale"] == "l1":
        factors = _drop.lengths(tensor, lambda block: kernels.trim(block.values, low, high))
    return {"low": low, "high": high, "factors": factors}


def limits(tensor: TensorTask) -> tuple[np.ndarray, np.ndarray]:
    """Of each input the least and the greatest magnitude that stay, [inputs] float32 each.

    The greatest `gamma` of the elements are dropped (fewer, where else too few would be left), and the greatest
    `density` of all that follow are kept. What ties with the last one kept stays too, as in the code of the TIES paper:
    no element is preferred for its place. With `scope: global` the count is over all tensors of the model together.
    """
    if not tensor.scope:
        return _limits(tensor, (tensor,))
    with tensor.lock:  # of all tensors of the scope, whichever comes first counts for all
        if "limits" not in tensor.shared:
            tensor.shared["limits"] = _limits(tensor, tensor.scope)
        return tensor.shared["limits"]


def _limits(tensor: TensorTask, tensors: Sequence[TensorTask]) -> tuple[np.ndarray, np.ndarray]:
    total = sum(t.count for t in tensors)
    ranks = []
    for m, density in enumerate(tensor.each["density"]):
        count = kept(float(density), total)
        dropped = min(int(tensor.each["gamma"][m] * total), total - count) if "gamma" in tensor.each else 0
        ranks.append([dropped + 1, dropped + count])
    found = np.zeros((len(ranks), 2), np.float32)
    found[:, 0] = np.inf
    partial = [m for m, (first, last) in enumerate(ranks) if first > 1 or last < total]
    if partial:
        # The first rank only where something is dropped at the top: each rank costs counting.
        wanted = [ranks[m] if ranks[m][0] > 1 else ranks[m][1:] * 2 for m in partial]
        every = len(partial) == len(ranks)
        found[partial] = magnitudes(tensors, wanted, None if every else lambda block: block.values[partial])
        found[[m for m in partial if ranks[m][0] == 1], 0] = np.inf
    return np.ascontiguousarray(found[:, 1]), np.ascontiguousarray(found[:, 0])


def elected(tensor: TensorTask, factors: np.ndarray | None = None, **more: Any) -> Fusion:
    """Elect signs and combine what agrees, times lambda, by the options elect, combine and zero.

    `factors` [inputs] multiply the deltas first, as rescaling after a random drop does.
    """
    weights = tensor.each["weight"]
    return Fusion(
        weights,
        factors,
        votes=np.sign(weights) if tensor.options["elect"] == "before" else weights,
        mean=tensor.options["combine"] == "mean",
        positive=tensor.options["zero"] == "positive",
        scale=tensor.options["lambda"],
        **more,
    )


def summed(tensor: TensorTask, factors: np.ndarray | None = None, **more: Any) -> Fusion:
    """The weighted sum of factor * delta, divided by the sum of the weights if `normalize`, times lambda."""
    weights = tensor.each["weight"]
    if tensor.options.get("normalize"):
        weights = weights / weights.sum()
    return Fusion(weights, factors, scale=tensor.options.get("lambda", 1.0), **more)
