"""What transformers' configuration classes fill in where a config.json says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vectors.documents.json_text import read_object
from vectors.errors import ModelError


def configuration(folder: Path) -> Any:
    """transformers' configuration of a model folder, without remote code. Raises whatever transformers raises."""
    from transformers import CONFIG_MAPPING

    values = read_object(folder / "config.json", ModelError, "fetch the model again")
    values.pop("quantization_config", None)
    return CONFIG_MAPPING[values["model_type"]].from_dict(values)


def ties_by_default(folder: Path) -> bool:
    """Whether a model whose config.json has no `tie_word_embeddings` ties its head to the embedding."""
    try:
        settings = configuration(folder)
    except Exception:  # an unknown architecture, or a configuration that its class refuses
        return False
    return bool(getattr(settings, "tie_word_embeddings", False))
