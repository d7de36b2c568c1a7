"""One row per architecture, by the `model_type` of its text decoder.

Every row is held to its pico model (tests/pico.py) by tests: the blocks are proved to return the residual stream, every
writer is ablated in the weights and compared with hooks, every addition too. To add an architecture, add a row here
and a pico model there, and run `python scripts/support_table.py`. What has no row still works if its stream can be
proved (`probes.models.stream_proof`); it is then read in padded batches, and not folded.
"""

from __future__ import annotations

from vectors.architectures.description import Architecture, Checkpoint

_EXPERTS = "its feed-forward is a mixture of experts, not a single gated one"
_UNGATED = "its feed-forward is not a gated one"
_SANDWICH = {"attention": "post_attention_layernorm.weight", "feed_forward": "post_feedforward_layernorm.weight"}
_O_PROJ = (r"self_attn\.o_proj\.(weight|bias)",)
_DOWN_PROJ = (r"mlp\.down_proj\.(weight|bias)",)
_MLP_BIASES = ("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias")
_GATE_UP = ("mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj")
_GEMMA = Checkpoint(norms=_SANDWICH, plus_one=True, norm_before="pre_feedforward_layernorm")
_POST_NORMS = Checkpoint(norms=_SANDWICH, norm_before=None)

_ROUTED = Checkpoint(  # experts, shared ones, and dense blocks before them
    writers={
        "attention": _O_PROJ,
        "feed_forward": (
            r"mlp\.down_proj\.weight",
            r"mlp\.experts\.\d+\.down_proj\.weight",
            r"mlp\.shared_experts?\.down_proj\.weight",
        ),
    },
    gated=_EXPERTS,
)

_DELTA_MODULES = {"attention": ("self_attn", "linear_attn"), "feed_forward": ("mlp",)}
_DELTA_WRITERS = (*_O_PROJ, r"linear_attn\.out_proj\.weight")

_MAMBA_MODULES = {"attention": ("self_attn", "mamba"), "feed_forward": ("feed_forward",)}

_CONV_MODULES = {"attention": ("self_attn", "conv"), "feed_forward": ("feed_forward",)}
_CONV_WRITERS = (r"self_attn\.out_proj\.weight", r"conv\.out_proj\.(weight|bias)")

ARCHITECTURES = {
    "arcee": Architecture(
        checkpoint=Checkpoint(
            slot="mlp.down_proj.bias",
            flag="mlp_bias",
            flag_brings=("mlp.up_proj.bias", "mlp.down_proj.bias"),
            gated=_UNGATED,
        )
    ),
    "bamba": Architecture(
        packs=False,
        continues=False,
        recurrent={"linear_attention": "mamba"},
        checkpoint=Checkpoint(
            writers={
                "attention": (*_O_PROJ, r"mamba\.out_proj\.(weight|bias)"),
                "feed_forward": (r"feed_forward\.down_proj\.(weight|bias)",),
            },
            modules=_MAMBA_MODULES,
            gated="its settings name the blocks with attention by their numbers",
        ),
    ),
    "cohere": Architecture(checkpoint=Checkpoint(norm_before="input_layernorm")),  # attention beside the feed-forward
    "cohere2": Architecture(checkpoint=Checkpoint(norm_before="input_layernorm")),
    "deepseek_v2": Architecture(checkpoint=_ROUTED),
    "deepseek_v3": Architecture(checkpoint=_ROUTED),
    "ernie4_5": Architecture(),
    "exaone4": Architecture(checkpoint=_POST_NORMS),
    "falcon_h1": Architecture(
        packs=False,
        recurrent={"hybrid": "mamba"},
        without_lora=("out_proj", "conv1d"),  # which the kernels of Mamba read without calling the module
        checkpoint=Checkpoint(
            writers={
                "attention": (*_O_PROJ, r"mamba\.out_proj\.(weight|bias)"),
                "feed_forward": (r"feed_forward\.down_proj\.(weight|bias)",),
            },
            modules=_MAMBA_MODULES,
            gated="it multiplies the gate of its feed-forward by a setting",
            norm_before="pre_ff_layernorm",
        ),
    ),
    "gemma": Architecture(checkpoint=Checkpoint(plus_one=True)),
    "gemma2": Architecture(checkpoint=_GEMMA),
    "gemma3_text": Architecture(wrappers=("gemma3",), checkpoint=_GEMMA),
    "gemma4_text": Architecture(
        wrappers=("gemma4",),
        checkpoint=Checkpoint(
            writers={
                "attention": _O_PROJ,
                "feed_forward": _DOWN_PROJ,
                "input of each layer": (r"per_layer_projection\.weight",),
            },
            modules={
                "attention": ("self_attn",),
                "feed_forward": ("mlp",),
                "input of each layer": ("per_layer_projection",),
            },
            norms={**_SANDWICH, "input of each layer": "post_per_layer_input_norm.weight"},
            gated="each of its blocks has an embedding of its own, and scales the stream",
            unless={"enable_moe_block": "two norms follow its feed-forward and its experts"},
        ),
    ),
    "glm": Architecture(checkpoint=Checkpoint(gated=_GATE_UP)),
    "glm4": Architecture(
        checkpoint=Checkpoint(
            norms={"attention": "post_self_attn_layernorm.weight", "feed_forward": "post_mlp_layernorm.weight"},
            gated=_GATE_UP,
        )
    ),
    "glm4_moe": Architecture(checkpoint=_ROUTED),
    "gpt2": Architecture(
        blocks="h",
        checkpoint=Checkpoint(
            block="h.{i}.",
            embeddings=("wte.weight", "wpe.weight"),
            writers={
                "attention": (r"attn\.c_proj\.(weight|bias)",),
                "feed_forward": (r"mlp\.c_proj\.(weight|bias)",),
            },
            columns=(r"attn\.c_proj\.weight", r"mlp\.c_proj\.weight"),
            slot="mlp.c_proj.bias",
            gated=_UNGATED,
        ),
    ),
    "gpt_neox": Architecture(
        checkpoint=Checkpoint(
            embeddings=("embed_in.weight",),
            head="embed_out.weight",
            writers={
                "attention": (r"attention\.dense\.(weight|bias)",),
                "feed_forward": (r"mlp\.dense_4h_to_h\.(weight|bias)",),
            },
            slot="mlp.dense_4h_to_h.bias",
            gated=_UNGATED,
        )
    ),
    "gpt_oss": Architecture(
        checkpoint=Checkpoint(
            writers={"attention": _O_PROJ, "feed_forward": (r"mlp\.experts\.down_proj(_bias)?",)},
            columns=(r"mlp\.experts\.down_proj(_bias)?",),
            slot="mlp.experts.down_proj_bias",  # of every expert: the weights of those chosen sum to 1
            gated=_EXPERTS,
        )
    ),
    "granite": Architecture(checkpoint=Checkpoint(scale="residual_multiplier")),
    "helium": Architecture(),
    "hunyuan_v1_dense": Architecture(),
    "jamba": Architecture(
        packs=False,
        continues=False,
        recurrent={"linear_attention": "mamba"},
        without_lora=("dt_proj",),  # whose weights are read without calling the module
        checkpoint=Checkpoint(
            writers={
                "attention": (*_O_PROJ, r"mamba\.out_proj\.(weight|bias)"),
                "feed_forward": (r"feed_forward\.down_proj\.weight", r"feed_forward\.experts\.\d+\.down_proj\.weight"),
            },
            modules=_MAMBA_MODULES,
            gated=_EXPERTS,
        ),
    ),
    "lfm2": Architecture(
        packs=False,
        recurrent={"conv": "conv"},
        checkpoint=Checkpoint(
            writers={"attention": _CONV_WRITERS, "feed_forward": (r"feed_forward\.w2\.weight",)},
            modules=_CONV_MODULES,
            gated=("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
            norm_before="ffn_norm",
        ),
    ),
    "lfm2_moe": Architecture(
        packs=False,
        recurrent={"conv": "conv"},
        checkpoint=Checkpoint(
            writers={
                "attention": _CONV_WRITERS,
                "feed_forward": (r"feed_forward\.w2\.weight", r"feed_forward\.experts\.\d+\.w2\.weight"),
            },
            modules=_CONV_MODULES,
            gated=_EXPERTS,
        ),
    ),
    "llama": Architecture(
        checkpoint=Checkpoint(slot="mlp.down_proj.bias", flag="mlp_bias", flag_brings=_MLP_BIASES),
    ),
    "minicpm3": Architecture(
        checkpoint=Checkpoint(gated="the scale of what its blocks add follows from their number"),
    ),
    "mistral": Architecture(wrappers=("mistral3",)),
    "mixtral": Architecture(
        checkpoint=Checkpoint(
            writers={"attention": _O_PROJ, "feed_forward": (r"block_sparse_moe\.experts\.\d+\.w2\.weight",)},
            gated=_EXPERTS,
        )
    ),
    "nemotron": Architecture(
        checkpoint=Checkpoint(
            slot="mlp.down_proj.bias",
            flag="mlp_bias",
            flag_brings=("mlp.up_proj.bias", "mlp.down_proj.bias"),
            gated=_UNGATED,
        )
    ),
    "olmo": Architecture(checkpoint=Checkpoint(norm_before=None)),  # its norms have no weights
    "olmo2": Architecture(checkpoint=_POST_NORMS),
    "olmo3": Architecture(checkpoint=_POST_NORMS),
    "olmoe": Architecture(checkpoint=_ROUTED),
    "phi": Architecture(
        checkpoint=Checkpoint(
            writers={
                "attention": (r"self_attn\.dense\.(weight|bias)",),
                "feed_forward": (r"mlp\.fc2\.(weight|bias)",),
            },
            slot="mlp.fc2.bias",
            gated=_UNGATED,
        )
    ),
    "phi3": Architecture(checkpoint=Checkpoint(gated=_GATE_UP)),
    "qwen2": Architecture(),
    "qwen2_5_vl_text": Architecture(wrappers=("qwen2_5_vl",)),
    "qwen2_moe": Architecture(checkpoint=_ROUTED),
    "qwen3": Architecture(),
    "qwen3_5_text": Architecture(
        packs=False,
        recurrent={"linear_attention": "linear_attn"},
        wrappers=("qwen3_5",),
        checkpoint=Checkpoint(
            writers={"attention": _DELTA_WRITERS, "feed_forward": _DOWN_PROJ}, modules=_DELTA_MODULES, plus_one=True
        ),
    ),
    "qwen3_moe": Architecture(checkpoint=_ROUTED),
    "qwen3_next": Architecture(
        packs=False,
        recurrent={"linear_attention": "linear_attn"},
        checkpoint=Checkpoint(
            writers={"attention": _DELTA_WRITERS, "feed_forward": _ROUTED.writers["feed_forward"]},
            modules=_DELTA_MODULES,
            gated=_EXPERTS,
        ),
    ),
    "seed_oss": Architecture(),
    "smollm3": Architecture(checkpoint=Checkpoint(per_block={"no_rope_layers": 1})),
    "stablelm": Architecture(),
    "starcoder2": Architecture(
        checkpoint=Checkpoint(
            writers={"attention": _O_PROJ, "feed_forward": (r"mlp\.c_proj\.(weight|bias)",)},
            slot="mlp.c_proj.bias",
            gated=_UNGATED,
        )
    ),
    "youtu": Architecture(),  # latent attention
}
