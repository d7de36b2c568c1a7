"""Where each architecture writes to its residual stream, and whether it has a bias that is added at a block's end.

Names are those of the checkpoint. A pattern is a regular expression for a parameter's name inside its block. Only
architectures that a test compares with the hooked model are listed; all others are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple


class Layout(NamedTuple):
    """How a checkpoint is laid out.

    `block` is the prefix of block {i}. `embeddings` write to the stream before block 0, one row per token. `attention`
    and `feed_forward` are the patterns of the matrices that write to it; `columns`: the stream is the last dimension of
    those matrices (GPT-2), not the first. `norms`: for "attention" and "feed_forward", the norm between a write and the
    stream (sandwich norms); `plus_one`: norms multiply by 1 + weight. `slot`: the bias that is added at the end of a
    block; it exists if the configuration sets `flag`, which brings all of `flag_brings`, or always if `flag` is None.
    `gated`: gate, up and down projection of a feed-forward down(act(gate x) * (up x)); `norm_before`: the norm before
    it. `modules`: names of the attention and of the feed-forward module in a loaded block.
    """

    block: str = "model.layers.{i}."
    embeddings: tuple[str, ...] = ("model.embed_tokens.weight",)
    attention: tuple[str, ...] = (r"self_attn\.o_proj\.(weight|bias)",)
    feed_forward: tuple[str, ...] = (r"mlp\.down_proj\.(weight|bias)",)
    columns: bool = False
    norms: Mapping[str, str] = {}
    plus_one: bool = False
    slot: str | None = None
    flag: str | None = None
    flag_brings: tuple[str, ...] = ()
    gated: tuple[str, str, str] | None = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    norm_before: str | None = "post_attention_layernorm.weight"
    modules: tuple[tuple[str, ...], tuple[str, ...]] = (("self_attn", "attn", "attention"), ("mlp", "feed_forward"))


_SANDWICH = {"attention": "post_attention_layernorm.weight", "feed_forward": "post_feedforward_layernorm.weight"}
_MLP_BIASES = ("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias")
_GEMMA = Layout(norms=_SANDWICH, plus_one=True, norm_before="pre_feedforward_layernorm.weight")

LAYOUTS = {
    "llama": Layout(slot="mlp.down_proj.bias", flag="mlp_bias", flag_brings=_MLP_BIASES),
    "mistral": Layout(),
    "qwen2": Layout(),
    "qwen3": Layout(),
    "phi3": Layout(gated=("mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj")),
    "gemma": Layout(plus_one=True),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": Layout(norms=_SANDWICH, norm_before=None),
    "gpt2": Layout(
        block="transformer.h.{i}.",
        embeddings=("transformer.wte.weight", "transformer.wpe.weight"),
        attention=(r"attn\.c_proj\.(weight|bias)",),
        feed_forward=(r"mlp\.c_proj\.(weight|bias)",),
        columns=True,
        slot="mlp.c_proj.bias",
        gated=None,
    ),
    "gpt_neox": Layout(
        block="gpt_neox.layers.{i}.",
        embeddings=("gpt_neox.embed_in.weight",),
        attention=(r"attention\.dense\.(weight|bias)",),
        feed_forward=(r"mlp\.dense_4h_to_h\.(weight|bias)",),
        slot="mlp.dense_4h_to_h.bias",
        gated=None,
    ),
    "phi": Layout(
        attention=(r"self_attn\.dense\.(weight|bias)",),
        feed_forward=(r"mlp\.fc2\.(weight|bias)",),
        slot="mlp.fc2.bias",
        gated=None,
    ),
    "starcoder2": Layout(
        attention=(r"self_attn\.o_proj\.(weight|bias)",),
        feed_forward=(r"mlp\.c_proj\.(weight|bias)",),
        slot="mlp.c_proj.bias",
        gated=None,
    ),
    "mixtral": Layout(feed_forward=(r"block_sparse_moe\.experts\.\d+\.w2\.weight",), gated=None),
    "lfm2": Layout(
        attention=(r"self_attn\.out_proj\.weight", r"conv\.out_proj\.(weight|bias)"),
        feed_forward=(r"feed_forward\.w2\.weight",),
        gated=("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
        norm_before="ffn_norm.weight",
        modules=(("self_attn", "conv"), ("feed_forward",)),
    ),
    "qwen3_next": Layout(
        attention=(r"self_attn\.o_proj\.weight", r"linear_attn\.out_proj\.weight"),
        feed_forward=(r"mlp\.experts\.\d+\.down_proj\.weight", r"mlp\.shared_expert\.down_proj\.weight"),
        gated=None,
        modules=(("self_attn", "linear_attn"), ("mlp",)),
    ),
}


def layout(config: Mapping[str, Any], names: Collection[str]) -> Layout | None:
    """The layout of a model by its configuration and its parameters' names, or None.

    Some checkpoints hold the decoder alone, whose names lack the first part: `h.0.` for `transformer.h.0.`.
    """
    known = LAYOUTS.get(str(config.get("model_type")))
    if known is None or known.embeddings[0] in names:
        return known
    short = known._replace(
        block=known.block.partition(".")[2], embeddings=tuple(name.partition(".")[2] for name in known.embeddings)
    )
    return short if short.embeddings[0] in names else None


def writers(checkpoint: Layout, names: Iterable[str], layers: range) -> dict[str, str | None]:
    """The parameters that write to the residual stream, in the embeddings and in the blocks `layers`.

    Each has the name of the norm between its output and the stream, or None.
    """
    result: dict[str, str | None] = {name: None for name in names if name in checkpoint.embeddings}
    prefix, _, rest = checkpoint.block.partition("{i}")
    for name in names:
        match = re.fullmatch(rf"{re.escape(prefix)}(\d+){re.escape(rest)}(.+)", name)
        if match is None or int(match[1]) not in layers:
            continue
        for part in ("attention", "feed_forward"):
            if any(re.fullmatch(pattern, match[2]) for pattern in getattr(checkpoint, part)):
                norm = checkpoint.norms.get(part)
                result[name] = f"{prefix}{match[1]}{rest}{norm}" if norm else None
    return result
