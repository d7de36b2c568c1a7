"""Pico models: every architecture that is supported, with random weights from a seed, and a tokenizer to go with them.

They are small enough to build in milliseconds and odd enough to find faults: more heads than key heads, tied and
untied embeddings, windows shorter than a sentence, states that recur.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

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

# Architectures that the table of residual streams does not know.
UNKNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN}),
    "phi": ("phi", {}),
    "cohere": ("cohere", {}),
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {}),
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


def config(name: str, **changes: Any) -> Any:
    """The configuration of a pico model; `changes` replace settings."""
    kind, own = (ARCHITECTURES | UNKNOWN)[name]
    settings = COMMON | own | changes
    return AutoConfig.for_model(kind, **settings)


def build(
    name: str, *, seed: int = 0, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A pico model with random weights: larger than at the start of training, so that every part of it matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config(name, **changes), attn_implementation=attention)
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
