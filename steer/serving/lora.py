"""LoRA adapters in vLLM: what an engine must be told before its start about those that it will serve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steer.experiments.specification import Experiment
from steer.serving.flags import has, taken, value_of
from steer.serving.settings import adapter_name
from vectors.documents.json_text import read_object
from vectors.errors import ArtifactError, UsageError

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


def lora_flags(experiments: Sequence[Experiment], flags: Sequence[str], *, on_cpu: bool) -> list[str]:
    """The flags for vLLM that load the LoRA adapters of arms, behind those that are given; none without an adapter.

    On a CPU, vLLM 0.32 applies an adapter to every request of a batch, also to those of other arms. So requests are
    served one at a time there. Raises UsageError, ArtifactError.
    """
    arms = [(experiment.name, arm) for experiment in experiments for arm in experiment.arms if arm.lora]
    if not arms:
        return []
    if taken(flags, "--lora-modules", "--lora-m")[1]:
        raise UsageError("an experiment has a LoRA arm beside -- --lora-modules", "make all adapters arms, or none")
    together = value_of(flags, "--max-num-seqs", "--max-num-se")
    if on_cpu and together not in (None, "1"):
        raise UsageError(
            f"--max-num-seqs is {together}, and on a CPU vLLM would apply a LoRA arm to all requests of a batch",
            "leave it out: requests are served one at a time then; or serve on a GPU",
        )
    modules = [json.dumps({"name": adapter_name(name, arm.name), "path": arm.lora}) for name, arm in arms]
    rank = lora_rank([Path(arm.lora) for _, arm in arms])
    enable = [] if has(flags, "--enable-lora", "--enable-lora") else ["--enable-lora"]
    serial = ["--max-num-seqs", "1"] if on_cpu and together is None else []
    return [*enable, *serial, "--max-lora-rank", str(rank), "--lora-modules", *modules]
