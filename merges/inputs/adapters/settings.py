"""adapter_config.json: every field is applied, has no effect on merged weights, or is refused by its name.

The fields are those of PEFT 0.21. A field that is not known here, such as one of a newer PEFT, is refused unless it is
empty: nobody can say what it does to the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from vectors.documents import schema

HIGHEST_RANK = 2**31
APPLIED_TYPES = ("LORA", "LN_TUNING", "IA3", "TRAINABLE_TOKENS")
MERGE_FIRST = "merge it with PEFT first (`merge_and_unload`, then `save_pretrained`), and use that model"
EMPTY: tuple[Any, ...] = (None, False, "", [], {})

# Fields that only training or loading reads: what is in the files stays the same without them.
WITHOUT_EFFECT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "runtime_config", "megatron_core", "qalora_group_size", "init_ia3_weights", "init_weights", "unsloth_fixed",
    "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
}  # fmt: skip
# Fields that say which modules the adapter has, and which are checked against its tensors.
SELECTING = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "target_parameters", "trainable_token_indices", "token_indices", "feedforward_modules",
}  # fmt: skip
LARGEST_SCALE = 1e30  # of an alpha; far beyond any, and within float32
SCALING = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias"}
CHECKED = {"init_lora_weights", "ensure_weight_tying"}
# Fields that change what the factors mean, in a way that is not a change of weights or is not known here.
REFUSED = {
    "alora_invocation_tokens": "it is an activated LoRA, which acts only after its invocation tokens",
    "arrow_config": "it routes each token to other adapters",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "its factors act on pooled inputs",
    "monteclora_config": "its factors are random",
    "kasa_config": "it decomposes the base and scales what it adds by singular values",
    "layer_replication": "it repeats layers of the base",
    "megatron_config": "it was trained on Megatron's layers, whose weights are laid out otherwise",
}
# Initialisations that take something away from the base's weights; PEFT does it again when it loads the adapter.
OF_BASE = {
    "pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA",
}  # fmt: skip
HARMLESS = ("gaussian", "eva", "orthogonal", "mica")
KNOWN = WITHOUT_EFFECT | SELECTING | SCALING | CHECKED | set(REFUSED)


class Settings(NamedTuple):
    """The checked settings of an adapter."""

    kind: str  # one of APPLIED_TYPES
    values: Mapping[str, Any]

    @property
    def base_name(self) -> str | None:
        """The model that it was trained on, as PEFT recorded it."""
        name = self.values.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def rank(self, module: str) -> int:
        """The rank of a module's factors."""
        return int(_of_module(self.values.get("rank_pattern"), module, self.values["r"]))

    def scale(self, module: str) -> float:
        """The factor of the product of a module's factors: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        rank = self.rank(module)
        alpha = float(_of_module(self.values.get("alpha_pattern"), module, self.values["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def selects(self, module: str) -> bool:
        """Whether PEFT would put an adapter on this module; what it would not is left out when it loads the file."""
        values = self.values
        excluded, saved = values.get("exclude_modules"), values.get("modules_to_save")
        if excluded and _named(excluded, module):
            return False
        for name in [saved] if isinstance(saved, str) else saved or ():
            if re.match(rf"(^|.*\.){name}($|\..*)", module):
                return False
        if _named(values.get("target_parameters") or [], f"{module}.weight"):
            return True
        target = values.get("target_modules")
        if target is None or target == "all-linear":
            return True
        if isinstance(target, str):
            return bool(re.fullmatch(target, module))
        return module in target or (_named(target, module) and self._in_layers(module))

    def _in_layers(self, module: str) -> bool:
        layers = self.values.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.values.get("layers_pattern") or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        forms = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
        match = next((m for form in forms if (m := re.match(form, module))), None)
        return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def _named(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return module in names or any(module.endswith(f".{name}") for name in names)


def _of_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def problems_of_settings(values: Mapping[str, Any]) -> list[str]:
    """Why an adapter_config.json can't be applied: a phrase per field, with its value, to follow its name."""
    kind = values.get("peft_type", "LORA")
    if kind not in APPLIED_TYPES:
        return [f"has the type {kind}, which is not among those that are applied ({', '.join(APPLIED_TYPES)})"]
    problems = _types(values, kind)
    if problems:
        return problems
    problems += [
        f"has {field}: {_short(values[field])}: {reason}"
        for field, reason in REFUSED.items()
        if values.get(field) not in EMPTY
    ]
    init = values.get("init_lora_weights", True)
    if isinstance(init, str):
        method = next((name for key, name in OF_BASE.items() if init.lower().startswith(key)), None)
        if method is not None:
            problems.append(
                f"has init_lora_weights: {init!r}: {method} takes a part of the base away before training, and its "
                "factors hold that part too"
            )
        elif init not in HARMLESS:
            problems.append(f"has init_lora_weights: {init!r}, which is not known")
    if values.get("bias", "none") not in ("none", "all", "lora_only"):
        problems.append(f"has bias: {values['bias']!r}, which is not known")
    problems += [
        f"has {field}: {_short(value)}, a setting that is not known"
        for field, value in sorted(values.items())
        if field not in KNOWN and value not in EMPTY
    ]
    return problems


def _types(values: Mapping[str, Any], kind: str) -> list[str]:
    """Fields with values of the wrong type."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_SCALE

    def rank(value: Any) -> bool:
        return not any(schema.whole(1, HIGHEST_RANK)(value, ""))

    def names(value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))

    def pattern_of(check: Any) -> Any:
        return lambda value: isinstance(value, dict) and all(_pattern(k) and check(v) for k, v in value.items())

    def patterns(value: Any) -> bool:
        return names(value) and (isinstance(value, list) or _pattern(value))

    def all_patterns(value: Any) -> bool:
        return names(value) and all(map(_pattern, [value] if isinstance(value, str) else value))

    def layers(value: Any) -> bool:
        return isinstance(value, int) or (isinstance(value, list) and all(isinstance(i, int) for i in value))

    def tokens(value: Any) -> bool:
        groups = value.values() if isinstance(value, dict) else [value]
        return all(isinstance(group, list) and all(isinstance(i, int) for i in group) for group in groups)

    def switch(value: Any) -> bool:
        return isinstance(value, bool)

    checks = {
        "r": rank, "lora_alpha": number, "rank_pattern": pattern_of(rank), "alpha_pattern": pattern_of(number),
        "target_modules": patterns, "exclude_modules": patterns, "modules_to_save": all_patterns,
        "target_parameters": names,
        "layers_pattern": all_patterns, "layers_to_transform": layers, "trainable_token_indices": tokens,
        "use_rslora": switch, "use_dora": switch, "lora_bias": switch, "bias": lambda value: isinstance(value, str),
        "init_lora_weights": lambda value: isinstance(value, bool | str), "token_indices": tokens,
        "feedforward_modules": patterns,
    }  # fmt: skip
    required = ("r", "lora_alpha") if kind == "LORA" else ()
    problems = [f"has no {field}" for field in required if values.get(field) is None]
    return problems + [
        f"has {field}: {_short(values[field])}, which is not of the right type or size"
        for field, is_valid in checks.items()
        if values.get(field) is not None and not is_valid(values[field])
    ]


def _pattern(text: Any) -> bool:
    try:
        return isinstance(text, str) and bool(re.compile(text) or True)
    except re.error:
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
