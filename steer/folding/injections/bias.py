"""The bias of each block's last projection, whose value is added to the residual stream unchanged."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from steer.folding.architectures import Layout
from steer.folding.pending import PendingModel

ORDER, SUMMARY = 0, "the bias of each block's last projection"


def refusal(pending: PendingModel, layout: Layout) -> str | None:
    """Why the model has no such bias, or None."""
    kind = pending.config.get("model_type")
    if layout.slot is None:
        return f"{kind} has no bias at the end of a block"
    if layout.flag is None and layout.block.format(i=0) + layout.slot not in pending.jobs:
        return f"this {kind} was made without biases"
    return None


def edit(pending: PendingModel, layout: Layout, added: Mapping[int, Tensor]) -> PendingModel:
    """Add to the biases; if a configuration flag enables them, set it, with zeros for the other biases it brings."""
    assert layout.slot is not None
    depth = int(pending.config.get("num_hidden_layers") or pending.config["n_layer"])
    settings = {layout.flag: True} if layout.flag else {}
    jobs = {}
    for i in range(depth):
        block = layout.block.format(i=i)
        for name in layout.flag_brings:
            if block + name not in pending.jobs:
                size = pending.jobs[block + name.replace(".bias", ".weight")].shape[0]
                jobs[block + name] = pending.constant(block + name, np.zeros(size))
        if i in added:
            slot, move = block + layout.slot, added[i].numpy()
            old = pending.read(slot).astype(np.float64) if slot in pending.jobs else 0.0
            jobs[slot] = pending.constant(slot, old + move)
    return pending.with_changes(jobs, **settings)
