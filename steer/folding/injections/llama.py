"""The model rewritten as a Llama, which has the bias: Qwen2, Mistral and Phi-3 compute what a Llama computes.

Weights are renamed, or fused ones split by rows, never changed; biases that only a Llama has are zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from merges.engine.jobs import Copy, Job
from steer.folding.injections import bias
from steer.folding.pending import PendingModel
from vectors.architectures import Checkpoint, find
from vectors.weights import SIZES, Entry

ORDER, SUMMARY = 1, "the model as a Llama, with biases"
SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "tie_word_embeddings", "rope_parameters", "rope_theta", "rope_scaling", "attention_dropout", "bos_token_id",
    "eos_token_id", "pad_token_id", "dtype", "torch_dtype",
)  # fmt: skip


def refusal(pending: PendingModel, described: Checkpoint) -> str | None:
    """Why the model can't be rewritten as a Llama, or None."""
    config = pending.config
    kind = config.get("model_type")
    if kind == "llama":
        return "the model is a Llama, whose own biases can be used (--via bias)"
    if kind not in ("qwen2", "mistral", "phi3"):
        return f"{kind} can't be rewritten as a Llama"
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        return f"this {kind} attends within a sliding window of {config['sliding_window']} tokens, which no Llama does"
    if any(kind != "full_attention" for kind in config.get("layer_types") or []):
        return f"this {kind} has layers without full attention"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    partial = config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    if rope_type != "default" or partial not in (None, 1, 1.0):
        return f"this {kind} has {rope_type} rotary positions over {partial:g} of each head, not those of a plain Llama"
    return None


def edit(pending: PendingModel, described: Checkpoint, added: Mapping[int, Tensor]) -> PendingModel:
    """Rename weights, split fused ones, and add the biases."""
    config = pending.config
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    head = int(config.get("head_dim") or hidden // heads)
    keys = int(config.get("num_key_value_heads") or heads) * head
    inner = int(config["intermediate_size"])
    jobs: dict[str, Job] = {}
    for name, job in pending.jobs.items():
        if name.endswith("self_attn.qkv_proj.weight"):
            cuts = {"q_proj": (0, heads * head), "k_proj": (heads * head, keys), "v_proj": (heads * head + keys, keys)}
            jobs |= _cut(job, name, "qkv_proj", cuts)
        elif name.endswith("mlp.gate_up_proj.weight"):
            jobs |= _cut(job, name, "gate_up_proj", {"gate_proj": (0, inner), "up_proj": (inner, inner)})
        else:
            jobs[name] = job
    llama = PendingModel(jobs, _as_llama(config), pending.pool)
    zero_biases = {}
    for i in range(int(config["num_hidden_layers"])):
        for part in "qkvo":
            name = f"model.layers.{i}.self_attn.{part}_proj"
            if f"{name}.bias" not in jobs:
                zero_biases[f"{name}.bias"] = llama.constant(f"{name}.bias", np.zeros(jobs[f"{name}.weight"].shape[0]))
    known = find("llama")
    assert known is not None
    assert isinstance(known.checkpoint, Checkpoint)
    as_llama = known.checkpoint.below(described.block.partition("layers.")[0])
    return bias.edit(llama.with_changes(zero_biases), as_llama, added)


def _as_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    shared = {key: config[key] for key in SHARED if config.get(key) is not None}
    return {**shared, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True}


def _cut(job: Job, name: str, fused: str, cuts: Mapping[str, tuple[int, int]]) -> dict[str, Job]:
    """Row ranges (first, count) of a fused matrix as jobs of their own, which read the same bytes of the file."""
    assert isinstance(job, Copy)
    entry, jobs = job.entry, dict[str, Job]()
    row = entry.shape[1] * SIZES[entry.dtype]
    for part, (first, count) in cuts.items():
        new = name.replace(fused, part)
        shape = (count, entry.shape[1])
        jobs[new] = Copy(new, Entry(entry.file, entry.dtype, shape, entry.start + first * row, count * row))
    return jobs
