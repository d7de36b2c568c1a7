"""LoRA adapters in vLLM: what an engine must be told before its start about those that it will serve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vectors.documents.json_text import read_object
from vectors.errors import ArtifactError

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM takes


def lora_rank(adapters: Sequence[Path]) -> int:
    """The smallest rank of vLLM's that holds all these adapters. Raises ArtifactError."""
    hint = "an adapter is a folder as PEFT saves it"
    ranks = [read_object(folder / "adapter_config.json", ArtifactError, hint).get("r") for folder in adapters]
    largest = max((rank for rank in ranks if isinstance(rank, int)), default=RANKS[1])
    return next((rank for rank in RANKS if rank >= largest), RANKS[-1])


def lora_arguments(adapters: Sequence[Path]) -> dict[str, Any]:
    """The arguments of vLLM's LLM for these adapters; none without one. Raises ArtifactError."""
    if not adapters:
        return {}
    different = list(dict.fromkeys(adapters))
    return {"enable_lora": True, "max_lora_rank": lora_rank(different), "max_loras": len(different)}
