"""What a field of a model's configuration means for a merge.

Every field that the configuration class of an architecture has changes what its weights mean, unless it is listed here.
`docs/merge.md` has a table made from these groups by `tests/merges/recipes/test_settings_agree.py`.
"""

from __future__ import annotations

import fnmatch
from typing import NamedTuple

DTYPE = ("dtype", "torch_dtype")
DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


class Group(NamedTuple):
    """Fields that do not have to agree: `fields` are globs for the last part of their name."""

    meaning: str
    fields: tuple[str, ...]
    noted: bool  # whether a difference is reported in a note


GROUPS = (
    Group(
        "how the files were written",
        ("_name_or_path", "name_or_path", "transformers_version", "transformers.js_config", *DTYPE, "architectures",
         "auto_map", "_commit_hash", "unsloth_*", "tokenizer_class", "quantization_config", "*attn_implementation*",
         "use_flash_attn*", "_flash_attn_2_enabled"),
        False,
    ),
    Group(
        "how a model is run",
        ("use_cache", "return_dict", "use_return_dict", "output_hidden_states", "output_attentions",
         "output_router_logits", "chunk_size_feed_forward", "pretraining_tp", "torchscript", "use_bfloat16",
         "tf_legacy_loss", "gradient_checkpointing*", "pruned_heads", "is_decoder", "cross_attention_hidden_size"),
        False,
    ),
    Group(
        "training alone",
        ("*dropout", "*pdrop", "*dropout_prob", "*dropout_rate", "*dropout_p", "*layerdrop", "initializer_range",
         "initializer_factor", "init_std", "router_aux_loss_coef", "router_z_loss_coef", "aux_loss_alpha", "seq_aux",
         "router_jitter_noise", "problem_type", "summary_*"),
        False,
    ),
    Group(
        "how text is generated, where no generation_config.json sets it",
        ("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
         "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
         "*no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate",
         "*suppress_tokens", "exponential_decay_length_penalty", "remove_invalid_values", "prefix",
         "task_specific_params", "finetuning_task"),
        False,
    ),
    Group(
        "the ids of special tokens",
        ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
         "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
        True,
    ),
    Group(
        "the longest context (refused where dynamic, yarn or longrope scaling depends on it)",
        ("max_position_embeddings", "model_max_length", "max_seq_len*", "seq_length", "n_ctx"),
        True,
    ),
    Group("what the tensors and the tokenizers show", ("vocab_size", "tie_word_embeddings"), False),
)  # fmt: skip
LENGTH_MATTERS = ("dynamic", "yarn", "longrope", "su")  # kinds of rope scaling that depend on the longest context


def group_of(key: str) -> Group | None:
    """The group of a field, by its last part; None: it has to agree."""
    last = key.rpartition(".")[2]
    return next((group for group in GROUPS if any(fnmatch.fnmatchcase(last, field) for field in group.fields)), None)
