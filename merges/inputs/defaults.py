"""What transformers' configuration classes fill in where a config.json says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vectors.documents.json_text import read_object
from vectors.errors import ModelError

# Types whose class does not tie by default, so that common models need no import of transformers, which takes seconds.
UNTIED = frozenset(
    (
        "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "phi", "phi3",
        "gpt_neox", "gptj", "olmo", "olmo2", "olmoe", "deepseek_v2", "deepseek_v3", "stablelm", "glm4", "glm4_moe",
        "granite", "gpt_oss", "codegen", "persimmon", "phimoe",
    )
)  # fmt: skip


def configuration(folder: Path) -> Any:
    """transformers' configuration of a model folder, without remote code. Raises whatever transformers raises."""
    from transformers import CONFIG_MAPPING

    values = read_object(folder / "config.json", ModelError, "fetch the model again")
    values.pop("quantization_config", None)
    return CONFIG_MAPPING[values["model_type"]].from_dict(values)


def ties_by_default(folder: Path) -> bool:
    """Whether a model whose config.json has no `tie_word_embeddings` ties its head to the embedding."""
    try:
        if read_object(folder / "config.json", ModelError, "").get("model_type") in UNTIED:
            return False
        settings = configuration(folder)
    except Exception:  # an unknown architecture, or a configuration that its class refuses
        return False
    return bool(getattr(settings, "tie_word_embeddings", False))
