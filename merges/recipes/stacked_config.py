"""The configuration of a model made of stacked layers: its depth, and its settings by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merges.inputs.decoder import DEPTHS, text_settings
from merges.recipes.recipe import Slice

# Lists whose entries are the numbers of layers.
_INDICES = (
    "mlp_only_layers", "cross_attention_layers", "attn_layer_indices", "hybrid_layer_ids", "global_attn_idx",
    "full_attn_idxs", "moe_layers", "dense_layers", "attention_layers_idx", "full_attention_layers",
)  # fmt: skip
# Lists that may have as many entries as there are layers, but are not settings by layer.
_NOT_LAYERS = ("token_id", "token_ids", "architectures", "mrope_section", "languages", "id2label", "label2id")
# Settings from which a model derives the kind of each layer (dense, with experts, with rope and so on). Each function
# gets the layer, the depth and the setting, and returns whether the layer is of that kind, which must not change.
_Kind = Callable[[int, int, int], bool]
_DERIVED: dict[str, _Kind] = {
    "first_k_dense_replace": lambda layer, depth, value: layer < value,
    "decoder_sparse_step": lambda layer, depth, value: (layer + 1) % value == 0,
    "moe_layer_freq": lambda layer, depth, value: layer % value == 0,
    "interleave_moe_layer_step": lambda layer, depth, value: (layer + 1) % value == 0,
    "no_rope_layer_interval": lambda layer, depth, value: (layer + 1) % value == 0,
    "num_kv_shared_layers": lambda layer, depth, value: layer >= depth - value,
    "attn_layer_period": lambda layer, depth, value: layer % value == 0,
    "expert_layer_period": lambda layer, depth, value: layer % value == 0,
    "num_dense_layers": lambda layer, depth, value: layer < value,
    "moe_layer_start_index": lambda layer, depth, value: layer >= value,
    "global_attn_every_n_layers": lambda layer, depth, value: layer % value == 0,
}
# The same for layers with full attention; `layer_types`, where a configuration has it, takes precedence.
_ATTENTION: dict[str, _Kind] = {
    "sliding_window_pattern": lambda layer, depth, value: (layer + 1) % value == 0,
    "full_attention_interval": lambda layer, depth, value: (layer + 1) % value == 0,
    "max_window_layers": lambda layer, depth, value: layer < value,
}
# The kind of the layers without full attention; sliding_attention by default.
_OTHER = {"full_attention_interval": "linear_attention"}


def stacked_config(config: Mapping[str, Any], slices: Sequence[Slice], main: str) -> tuple[dict[str, Any], list[str]]:
    """The configuration of the stacked model, from that of `main`, and the problems, one sentence each.

    The depth of the text decoder is written wherever it stands, and lists by layer are cut and ordered as the layers
    are. What a configuration derives from a layer's number must be the same for a layer at its old and new place.
    """
    chosen = [
        layer
        for entry in slices
        for source in [next((s for s in entry.sources if s.model == main), entry.sources[0])]
        for layer in range(*source.layers)
    ]
    changed = copy.deepcopy(dict(config))
    text = text_settings(changed)
    before = next((text[key] for key in DEPTHS if isinstance(text.get(key), int)), max(chosen, default=-1) + 1)
    problems: list[str] = []
    for settings in (text, *([changed] if text is not changed else [])):
        assert isinstance(settings, dict)
        if settings is changed and text is not changed and not any(settings.get(key) == before for key in DEPTHS):
            continue  # the outer configuration does not describe the decoder
        problems += _stack(settings, chosen, before)
    return changed, list(dict.fromkeys(problems))


def _stack(settings: dict[str, Any], chosen: list[int], before: int) -> list[str]:
    """Change one level of a configuration in place; returns the problems."""
    problems = []
    for key, kind in (_ATTENTION | _DERIVED).items():
        value = settings.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1 or _unused(settings, key):
            continue
        changed = [
            (old, new) for new, old in enumerate(chosen) if kind(old, before, value) != kind(new, len(chosen), value)
        ]
        if not changed:
            continue
        if key in _ATTENTION and isinstance(settings.get("layer_types"), list):
            continue  # `layer_types` takes precedence, and is reordered below
        if key in _ATTENTION:
            other = _OTHER.get(key, "sliding_attention")
            types = ["full_attention" if kind(layer, before, value) else other for layer in range(before)]
            settings["layer_types"] = types
        else:
            problems.append(
                f"layer {changed[0][0]} would be layer {changed[0][1]}, and by the configuration's {key}: {value} "
                "a layer of another kind"
            )
    for key in DEPTHS:
        if settings.get(key) == before:
            settings[key] = len(chosen)
    for key, value in settings.items():
        if not isinstance(value, list) or any(word in key for word in _NOT_LAYERS):
            continue
        if key in _INDICES and all(isinstance(index, int) for index in value):
            settings[key] = [new for new, old in enumerate(chosen) if old in value]
        elif len(value) == before and max(chosen, default=-1) < len(value):
            settings[key] = [value[layer] for layer in chosen]
    if isinstance(settings.get("max_window_layers"), int):
        settings["max_window_layers"] = min(settings["max_window_layers"], len(chosen))
    return problems


def _unused(settings: Mapping[str, Any], key: str) -> bool:
    """Whether a setting is present but has no effect."""
    if key == "max_window_layers":
        return not settings.get("use_sliding_window")
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if key in ("decoder_sparse_step", "moe_layer_freq"):
        return not any(settings.get(name) for name in experts)
    return key == "sliding_window_pattern" and not settings.get("sliding_window")
