"""The bias of each block's last projection, whose value is added to the residual stream unchanged."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from steer.folding.pending import PendingModel
from vectors.architectures import Checkpoint

ORDER, SUMMARY = 0, "the bias of each block's last projection"


def refusal(pending: PendingModel, described: Checkpoint) -> str | None:
    """Why the model has no such bias, or None."""
    kind = pending.config.get("model_type")
    if described.slot is None:
        return f"{kind} has no bias at the end of a block"
    if described.flag is None and described.block.format(i=0) + described.slot not in pending.jobs:
        return f"this {kind} was made without biases"
    return None


def edit(pending: PendingModel, described: Checkpoint, added: Mapping[int, Tensor]) -> PendingModel:
    """Add to the biases; if a configuration flag enables them, set it, with zeros for the other biases it brings."""
    assert described.slot is not None
    depth = int(pending.text.get("num_hidden_layers") or pending.text["n_layer"])
    settings = {described.flag: True} if described.flag else {}
    jobs = {}
    for i in range(depth):
        block = described.block.format(i=i)
        for name in described.flag_brings:
            if block + name not in pending.jobs:
                size = pending.jobs[block + name.replace(".bias", ".weight")].shape[0]
                jobs[block + name] = pending.constant(block + name, np.zeros(size))
        if i in added:
            slot, move = block + described.slot, added[i].numpy()
            old = pending.read(slot).astype(np.float64) if slot in pending.jobs else 0.0
            jobs[slot] = pending.constant(slot, old + move)
    return pending.with_changes(jobs).with_text_settings(**settings)
