"""One inserted block after each steered one, whose feed-forward is constant: exact in gated models with RMSNorm.

With two neurons for each dimension of the stream, gate = up = +e_i and gate = up = -e_i, act(z) z + act(-z)(-z) = z^2
for SiLU and GELU, and over all dimensions the squares of a normalised vector sum to their number d. So a down
projection with columns v/d gives v for every input. Attention's output projection is zero. A norm after the
feed-forward undoes any scale, so there the columns use v/rms(v) and the norm's weight is rms(v). All this is exact up
to the norm's epsilon.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from merges.engine.jobs import Copy, Job
from merges.engine.readers import LowRank, Reader, Sparse, Zero
from steer.folding.architectures import Layout
from steer.folding.pending import PendingModel

ORDER, SUMMARY = 2, "an inserted block with a constant feed-forward"
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
CHEAP = ("linear_attention", "conv", "sliding_attention")  # token mixers with a smaller cache than full attention
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "block_types")


def refusal(pending: PendingModel, layout: Layout) -> str | None:
    """Why no constant block can be inserted, or None."""
    config = pending.config
    kind, act = config.get("model_type"), config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if layout.gated is None:
        return f"the feed-forward of {kind} is not a single gated one"
    if act not in ACTIVATIONS:
        return f"the activation {act} does not give squares (act(z) z + act(-z)(-z) = z^2)"
    inner = _inner(pending, layout)
    if inner < 2 * int(config["hidden_size"]):
        return f"its feed-forward has {inner} neurons, fewer than twice the {config['hidden_size']} of the stream"
    if config.get("use_sliding_window") and not _types(config):
        return f"inserting a block would change which layers of this {kind} have a sliding window"
    return None


def edit(pending: PendingModel, layout: Layout, added: Mapping[int, Tensor]) -> PendingModel:
    """Insert a block after each layer that something is added to, and renumber the later blocks."""
    config = pending.config
    depth, types = int(config["num_hidden_layers"]), _types(config)
    prefix, _, rest = layout.block.partition("{i}")
    pattern = re.compile(rf"{re.escape(prefix)}(\d+){re.escape(rest)}(.+)")
    moved = {i: i + sum(layer < i for layer in added) for i in range(depth)}
    blocks: dict[int, dict[str, Job]] = {i: {} for i in range(depth)}
    jobs: dict[str, Job] = {}
    for name, job in pending.jobs.items():
        match = pattern.fullmatch(name)
        if match is None:
            jobs[name] = job
            continue
        i, inside = int(match[1]), match[2]
        blocks[i][inside] = job
        new = f"{prefix}{moved[i]}{rest}{inside}"
        jobs[new] = job._replace(name=new) if isinstance(job, Copy) else _renamed(job, new)
    chosen = {}
    for layer, move in added.items():
        copied = chosen[layer] = _copied_block(layer, types)
        block = f"{prefix}{moved[layer] + 1}{rest}"
        constant = _constant(pending, layout, blocks[copied], move.numpy())
        for inside, job in blocks[copied].items():
            name = block + inside
            reader = constant.get(inside)
            if reader is not None:
                jobs[name] = pending.tensor_from(name, reader)
            elif isinstance(job, Copy):
                jobs[name] = job._replace(name=name)
            else:
                jobs[name] = _renamed(job, name)
    settings: dict[str, Any] = {"num_hidden_layers": depth + len(added)}
    if types:
        kinds = list(types)
        for layer in sorted(added, reverse=True):
            kinds.insert(layer + 1, types[chosen[layer]])
        settings["layer_types"] = kinds
    return PendingModel(jobs, {**config, **settings}, pending.pool)


def _constant(pending: PendingModel, layout: Layout, block: Mapping[str, Job], move: np.ndarray) -> dict[str, Reader]:
    """The tensors in which an inserted block differs from the copied `block`, by name inside the block."""
    assert layout.gated is not None
    gate, up, down = layout.gated
    hidden, inner = len(move), _inner(pending, layout)
    unit_weight = 0.0 if layout.plus_one else 1.0
    readers: dict[str, Reader] = {}
    neurons = np.arange(2 * hidden)
    positions, signs = neurons * hidden + neurons // 2, np.where(neurons % 2, -1, 1).astype(np.float32)
    if gate == up:  # one matrix holds both, the gate's rows first
        both = np.concatenate([positions, positions + inner * hidden])
        readers[f"{gate}.weight"] = Sparse((2 * inner, hidden), both, np.concatenate([signs, signs]))
    else:
        readers[f"{gate}.weight"] = readers[f"{up}.weight"] = Sparse((inner, hidden), positions, signs)
    scale = 1.0
    if layout.norms:
        scale = float(np.sqrt(np.mean(move**2)))
        readers[layout.norms["feed_forward"]] = _filled(hidden, scale - 1 if layout.plus_one else scale)
    used = (np.arange(inner) < 2 * hidden).astype(np.float32)
    readers[f"{down}.weight"] = LowRank((move / scale / hidden)[:, None], used[None])
    if layout.norm_before:
        readers[layout.norm_before] = _filled(hidden, unit_weight)
    for inside, job in block.items():
        writes = any(re.fullmatch(pattern, inside) for pattern in layout.attention)
        is_feed_forward_bias = inside.endswith(".bias") and inside.partition(".")[0] == gate.partition(".")[0]
        if writes or is_feed_forward_bias:
            readers[inside] = Zero(tuple(job.shape))
    return readers


def _filled(size: int, value: float) -> Reader:
    from merges.engine.readers import Array

    return Array(np.full(size, value, np.float32))


def _inner(pending: PendingModel, layout: Layout) -> int:
    """Neurons of the feed-forward, from the shape of its last matrix, since configurations name them differently."""
    assert layout.gated is not None
    return pending.jobs[f"{layout.block.format(i=0)}{layout.gated[2]}.weight"].shape[1]


def _types(config: Mapping[str, Any]) -> list[str]:
    """The type of each layer, from the configuration or transformers' defaults; empty if all are of one type."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    from transformers import AutoConfig

    settings = {key: value for key, value in config.items() if key != "model_type"}
    return list(getattr(AutoConfig.for_model(config["model_type"], **settings), "layer_types", None) or [])


def _copied_block(layer: int, types: list[str]) -> int:
    """The block that an inserted one copies: the nearest with a small cache, else the steered one."""
    cheap = [i for i, kind in enumerate(types) if kind in CHEAP]
    return min(cheap, key=lambda i: (abs(i - layer), i)) if cheap else layer


def _renamed(job: Any, name: str) -> Job:
    from dataclasses import replace

    return replace(job, name=name)
