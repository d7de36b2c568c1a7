"""NearSwap: the first model, replaced by the second where the two are close."""

from __future__ import annotations

import numpy as np

from merges.engine.method import MergeMethod
from merges.engine.tensor_task import Block, TensorTask
from vectors.registry.options import Option


def combine(task: TensorTask, block: Block, _prepared: None) -> np.ndarray:
    """v * b + (1 - v) * a with v = min(t / |a - b|, 1)."""
    a, b = block.values.astype(np.float64)
    distance = np.maximum(np.abs(a - b), 1e-6)
    share = np.clip(task.options["t"] / distance, 0, 1)
    return share * b + (1 - share) * a


METHOD = MergeMethod(
    name="nearswap",
    summary="the first, replaced by the second where they are close",
    source="alchemonaut/QuartetAnemoi-70B-t0.0001; mergekit's nearswap",
    options=(Option("t", 0.0001, "the distance below which the second is taken completely", low=0),),
    space="weight",
    base="unused",
    inputs=(2, 2),
    symmetric=False,
    combine=combine,
)
