"""Pico models: every architecture that is supported, with random weights from a seed, and a tokenizer to go with them.

They are small enough to build in milliseconds and odd enough to find faults: more heads than key heads, tied and
untied embeddings, windows shorter than a sentence, states that recur.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

LAYERS = 4
HIDDEN = 32
VOCABULARY = 320
WINDOW = 6  # of the models that have a small sliding window

PAD, BOS, EOS, START, END = "<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, BOS, EOS, START, END)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_AND_GLOBAL = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

# By name: the model type of transformers, and what its configuration needs beyond the common part.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": WINDOW}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {**_LOCAL_AND_GLOBAL, "sliding_window": 128}),
    "gemma2-window": ("gemma2", {**_LOCAL_AND_GLOBAL, "sliding_window": WINDOW}),
    "gemma3": ("gemma3_text", {**_LOCAL_AND_GLOBAL, "sliding_window": 128}),
    "gemma3-window": ("gemma3_text", {**_LOCAL_AND_GLOBAL, "sliding_window": WINDOW}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "gpt2": ("gpt2", {}),
    "gpt-neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_multiple_of": 16},
    ),
    "qwen3-next": (
        "qwen3_next",
        {
            **_EXPERTS,
            "head_dim": 16,
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
        },
    ),
}
NAMES = tuple(ARCHITECTURES)
NO_SDPA = ("gpt-oss", "deepseek-v4", "bloom", "gpt-j", "mamba", "mamba2", "falcon-mamba", "rwkv")

_GATED_DELTA_NET = {
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LATENT = {  # attention through latent keys and values (MLA)
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_ROUTED = {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_WINDOWED = {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2}
_HEADS_OF_8 = {"head_dim": 8}

# Further architectures that are described, which cost a few tests each.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("qwen3_moe", {**_EXPERTS, "head_dim": 16, "num_experts": 4}),
    "qwen3.5": ("qwen3_5_text", {**_GATED_DELTA_NET, "head_dim": 16}),
    "lfm2-moe": (
        "lfm2_moe",
        {**_EXPERTS, "num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    ),
    "deepseek-v2": ("deepseek_v2", {**_LATENT, **_ROUTED, "topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "deepseek-v3": ("deepseek_v3", {**_LATENT, **_ROUTED, "n_group": 2, "topk_group": 1}),
    "youtu": ("youtu", {**_LATENT, "tie_word_embeddings": False}),
    "olmo3": ("olmo3", {**_WINDOWED}),
    "stablelm": ("stablelm", {}),
    "glm4": ("glm4", {**_HEADS_OF_8}),
    "gpt-oss": ("gpt_oss", {**_WINDOWED, **_HEADS_OF_8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": (
        "granite",
        {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    ),
    "smollm3": ("smollm3", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "falcon-h1": (
        "falcon_h1",
        {
            **_HEADS_OF_8,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 4,
            "key_multiplier": 0.5,
            "ssm_in_multiplier": 0.7,
            "mlp_multipliers": [0.9, 1.2],
        },
    ),
    "cohere2": ("cohere2", {**_WINDOWED, **_HEADS_OF_8, "logit_scale": 1.0}),
    "seed-oss": ("seed_oss", {"head_dim": 16}),
    "minicpm3": ("minicpm3", {**_LATENT, "scale_depth": 1.4, "scale_emb": 4, "dim_model_base": HIDDEN}),
    "phi": ("phi", {}),
    "cohere": ("cohere", {"logit_scale": 1.0}),
    "olmo": ("olmo", {}),
    "nemotron": ("nemotron", {}),
    "gemma4": (
        "gemma4_text",
        {
            **_WINDOWED,
            **_HEADS_OF_8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 0,
        },
    ),
}

# Text decoders inside vision-language models: the kind of the whole, the text's settings, those of the images' tower.
_TOWER = {"hidden_size": 32, "intermediate_size": 32, "patch_size": 4}
_SIGLIP = {**_TOWER, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
_QWEN_TOWER = {**_TOWER, "depth": 1, "num_heads": 2, "out_hidden_size": HIDDEN}
_THREE_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
WRAPPERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2.5-vl": ("qwen2_5_vl", {**_THREE_AXES}, {**_QWEN_TOWER, "fullatt_block_indexes": [0]}),
    "qwen3.5-vl": (
        "qwen3_5",
        {**_GATED_DELTA_NET, "head_dim": 16},
        {**_QWEN_TOWER, "num_position_embeddings": 16},
    ),
    "mistral3": (
        "mistral3",
        {**_HEADS_OF_8, "model_type": "mistral", "sliding_window": None},
        {**_SIGLIP, "model_type": "pixtral", "head_dim": 16},
    ),
    "gemma3-vl": ("gemma3", {**_HEADS_OF_8, "sliding_window": 128}, _SIGLIP),
}

# Architectures that no table knows.
UNKNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN}),
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {}),
    "granite-moe": ("granitemoe", {"residual_multiplier": 0.3, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "minimax": (  # with a cache of its own, of which the first layer holds no tokens
        "minimax",
        {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "block_size": 8,
        },
    ),
}

# Architectures whose blocks do not return one residual stream.
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3n": (
        "gemma3n_text",
        {
            **_HEADS_OF_8,
            "intermediate_size": 64,
            "laurel_rank": 4,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
    "deepseek-v4": (  # hyper-connections
        "deepseek_v4",
        {
            **_HEADS_OF_8,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 1,
            "q_lora_rank": 8,
            "o_groups": 2,
            "o_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 4,
        },
    ),
}

# Architectures on which serving is tried with a wider stream; some of them have no row.
_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 8}
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-moe": ("qwen2_moe", {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-j": ("gptj", {"n_embd": 128, "n_layer": LAYERS, "n_head": 4, "n_positions": 256, "rotary_dim": 16}),
    "exaone4": ("exaone4", {"head_dim": 32, "sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "ernie4.5": ("ernie4_5", {}),
    "ernie4.5-moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    ),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "glm": ("glm", {"head_dim": 32}),
    "glm4-moe": ("glm4_moe", {**_ROUTED, "head_dim": 32}),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 32}),
    "phimoe": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mamba": ("mamba", {"state_size": 16, "expand": 2, "intermediate_size": 256}),
    "falcon-mamba": ("falcon_mamba", {"state_size": 16, "expand": 2, "intermediate_size": 256}),
    "rwkv": ("rwkv", {"attention_hidden_size": 128, "context_length": 256}),
    "mamba2": (
        "mamba2",
        {"num_heads": 8, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 8, "intermediate_size": 256},
    ),
    "bamba": ("bamba", {**_MAMBA_2, "attn_layer_indices": [1]}),
    "granite-hybrid": (
        "granitemoehybrid",
        {
            **_MAMBA_2,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "residual_multiplier": 0.3,
        },
    ),
    "jamba": (
        "jamba",
        {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 16,
            "use_mamba_kernels": False,
        },
    ),
    "nemotron-h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "ssm_state_size": 16,
            "head_dim": 32,
            "chunk_size": 8,
        },
    ),
    "zamba2": (
        "zamba2",
        {
            "mamba_d_state": 16,
            "n_mamba_heads": 8,
            "mamba_headdim": 32,
            "mamba_ngroups": 1,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "num_mem_blocks": 2,
            "attention_head_dim": 64,
            "adapter_rank": 8,
            "num_key_value_heads": 4,
        },
    ),
    "helium": ("helium", {"head_dim": 32}),  # vLLM has no code of its own for it
}


def config(name: str, **changes: Any) -> Any:
    """The configuration of a pico model; `changes` replace settings, of the text decoder in a wrapper."""
    if name in WRAPPERS:
        kind, own, tower = WRAPPERS[name]
        ends = {key: COMMON[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
        tied = {"tie_word_embeddings": changes["tie_word_embeddings"]} if "tie_word_embeddings" in changes else {}
        return AutoConfig.for_model(kind, text_config=COMMON | own | changes, vision_config=tower, **ends, **tied)
    kind, own = (ARCHITECTURES | MORE | UNKNOWN | STREAMS | SERVED)[name]
    settings = COMMON | own | changes
    return AutoConfig.for_model(kind, **settings)


def build(
    name: str, *, seed: int = 0, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A pico model with random weights: larger than at the start of training, so that every part of it matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = config(name, **changes)
        kind = AutoModelForImageTextToText if name in WRAPPERS else AutoModelForCausalLM
        if name in NO_SDPA:
            attention = "eager"
        model = kind.from_config(settings, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 0.2 if parameter.ndim > 1 else 0.1
                parameter.add_(scale * torch.randn_like(parameter))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model.to(dtype).eval().requires_grad_(False)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few whole words, special tokens, offsets and a ChatML template.

    It writes `<|bos|>` before a plain text, as many tokenizers do; the chat template writes it itself.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges: list[tuple[str, str]] = []
    for word in ("Ġthe", "Ġwarm", "Ġcold", "Ġis", "Ġand", "user", "assistant", "Ġyes", "Ġno"):
        part = word[0]
        for letter in word[1:]:
            if part + letter not in vocabulary:
                vocabulary[part + letter] = len(vocabulary)
            if (part, letter) not in merges:
                merges.append((part, letter))
            part += letter
    assert len(vocabulary) <= VOCABULARY
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=None))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    built.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 1)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[START, END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def save(folder: Path, name: str = "llama", **settings: Any) -> Path:
    """Write a pico model and the tokenizer as a model folder; returns the folder."""
    build(name, **settings).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sequences(count: int, shortest: int, longest: int, *, seed: int = 0) -> list[list[int]]:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    first = len(SPECIAL)
    return [torch.randint(first, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def left_padded(rows: Sequence[Sequence[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    """Sequences as one batch, padded on the left: `input_ids` and `attention_mask` [rows, longest]."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def hooks(model: torch.nn.Module) -> int:
    """How many hooks are registered in a model, without those with which transformers collects hidden states."""
    registered = [
        hook for m in model.modules() for hook in [*m._forward_hooks.values(), *m._forward_pre_hooks.values()]
    ]
    return sum(not hook.__module__.startswith("transformers") for hook in registered)
