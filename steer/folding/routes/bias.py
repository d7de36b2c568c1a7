"""A bias on the block's last projection: where there is one, what is added to it reaches the stream as it is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from steer.folding.architectures import Layout
from steer.folding.pending import Draft

ORDER, SUMMARY = 0, "the bias of each block's last projection"


def refusal(draft: Draft, layout: Layout) -> str | None:
    """Why there is no slot, or None."""
    kind = draft.config.get("model_type")
    if layout.slot is None:
        return f"{kind} has no bias at the end of a block"
    if layout.flag is None and layout.block.format(i=0) + layout.slot not in draft.jobs:
        return f"this {kind} was made without biases"
    return None


def edit(draft: Draft, layout: Layout, added: Mapping[int, Tensor]) -> Draft:
    """Add to the biases that are there; where a flag brings them, zeros to all that it brings."""
    assert layout.slot is not None
    depth = int(draft.config.get("num_hidden_layers") or draft.config["n_layer"])
    settings = {layout.flag: True} if layout.flag else {}
    jobs = {}
    for i in range(depth):
        block = layout.block.format(i=i)
        for name in layout.flag_brings:
            if block + name not in draft.jobs:
                size = draft.jobs[block + name.replace(".bias", ".weight")].shape[0]
                jobs[block + name] = draft.constant(block + name, np.zeros(size))
        if i in added:
            slot, move = block + layout.slot, added[i].numpy()
            old = draft.read(slot).astype(np.float64) if slot in draft.jobs else 0.0
            jobs[slot] = draft.constant(slot, old + move)
    return draft.changed(jobs, **settings)
