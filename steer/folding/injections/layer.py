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
from steer.folding.pending import PendingModel
from vectors.architectures import Checkpoint

ORDER, SUMMARY = 2, "an inserted block with a constant feed-forward"
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
CHEAP = ("linear_attention", "conv", "sliding_attention")  # token mixers with a smaller cache than full attention


def refusal(pending: PendingModel, described: Checkpoint) -> str | None:
    """Why no constant block can be inserted, or None."""
    config = pending.text
    kind, act = config.get("model_type"), config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if isinstance(described.gated, str):
        return described.gated
    before = described.norm_before
    if before and described.block.format(i=0) + f"{before}.weight" not in pending.jobs:
        return f"this {kind} has no norm before its feed-forward"
    if act not in ACTIVATIONS:
        return f"the activation {act} does not give squares (act(z) z + act(-z)(-z) = z^2)"
    inner = _inner(pending, described)
    if inner < 2 * int(config["hidden_size"]):
        return f"its feed-forward has {inner} neurons, fewer than twice the {config['hidden_size']} of the stream"
    if config.get("use_sliding_window") and not _per_block(pending, described).get("layer_types"):
        return f"inserting a block would change which layers of this {kind} have a sliding window"
    return None


def edit(pending: PendingModel, described: Checkpoint, added: Mapping[int, Tensor]) -> PendingModel:
    """Insert a block after each layer that something is added to, and renumber the later blocks."""
    depth, lists = int(pending.text["num_hidden_layers"]), _per_block(pending, described)
    types = lists.get("layer_types", [])
    prefix, _, rest = described.block.partition("{i}")
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
        constant = _constant(pending, described, blocks[copied], move.numpy())
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
    for key, values in lists.items():
        longer = list(values)
        for layer in sorted(added, reverse=True):
            longer.insert(layer + 1, described.per_block.get(key, values[chosen[layer]]))
        settings[key] = longer
    return PendingModel(jobs, pending.config, pending.pool).with_text_settings(**settings)


def _constant(
    pending: PendingModel, described: Checkpoint, block: Mapping[str, Job], move: np.ndarray
) -> dict[str, Reader]:
    """The tensors in which an inserted block differs from the copied `block`, by name inside the block."""
    assert not isinstance(described.gated, str)
    gate, up, down = described.gated
    hidden, inner = len(move), _inner(pending, described)
    if described.scale is not None:
        move = move / float(pending.text.get(described.scale, 1.0))
    unit_weight = 0.0 if described.plus_one else 1.0
    readers: dict[str, Reader] = {}
    neurons = np.arange(2 * hidden)
    positions, signs = neurons * hidden + neurons // 2, np.where(neurons % 2, -1, 1).astype(np.float32)
    if gate == up:  # one matrix holds both, the gate's rows first
        both = np.concatenate([positions, positions + inner * hidden])
        readers[f"{gate}.weight"] = Sparse((2 * inner, hidden), both, np.concatenate([signs, signs]))
    else:
        readers[f"{gate}.weight"] = readers[f"{up}.weight"] = Sparse((inner, hidden), positions, signs)
    scale = 1.0
    if described.norms:
        scale = float(np.sqrt(np.mean(move**2)))
        readers[described.norms["feed_forward"]] = _filled(hidden, scale - 1 if described.plus_one else scale)
    used = (np.arange(inner) < 2 * hidden).astype(np.float32)
    readers[f"{down}.weight"] = LowRank((move / scale / hidden)[:, None], used[None])
    if described.norm_before:
        readers[f"{described.norm_before}.weight"] = _filled(hidden, unit_weight)
        if f"{described.norm_before}.bias" in block:
            readers[f"{described.norm_before}.bias"] = _filled(hidden, 0.0)
    for inside, job in block.items():
        writes = any(re.fullmatch(pattern, inside) for pattern in described.writers["attention"])
        is_feed_forward_bias = inside.endswith(".bias") and inside.partition(".")[0] == gate.partition(".")[0]
        if writes or is_feed_forward_bias:
            readers[inside] = Zero(tuple(job.shape))
    return readers


def _filled(size: int, value: float) -> Reader:
    from merges.engine.readers import Array

    return Array(np.full(size, value, np.float32))


def _inner(pending: PendingModel, described: Checkpoint) -> int:
    """Neurons of the feed-forward, from the shape of its last matrix, since configurations name them differently."""
    assert not isinstance(described.gated, str)
    return pending.jobs[f"{described.block.format(i=0)}{described.gated[2]}.weight"].shape[1]


def _per_block(pending: PendingModel, described: Checkpoint) -> dict[str, list[Any]]:
    """The settings with one value per block, from the configuration or transformers' defaults."""
    wanted = ("layer_types", *described.per_block)
    stated = {key: list(pending.text[key]) for key in wanted if pending.text.get(key)}
    if len(stated) == len(wanted):
        return stated
    from transformers import CONFIG_MAPPING

    defaults = CONFIG_MAPPING[str(pending.config["model_type"])].from_dict(dict(pending.config))
    text = defaults.get_text_config(decoder=True)
    return {key: list(values) for key in wanted if (values := getattr(text, key, None))}


def _copied_block(layer: int, types: list[str]) -> int:
    """The block that an inserted one copies: the nearest with a small cache, else the steered one."""
    cheap = [i for i, kind in enumerate(types) if kind in CHEAP]
    return min(cheap, key=lambda i: (abs(i - layer), i)) if cheap else layer


def _renamed(job: Any, name: str) -> Job:
    from dataclasses import replace

    return replace(job, name=name)
