"""The student: the base with a LoRA adapter, or with all weights trainable; its base weights are the teacher's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from probes.models import residual
from probes.seeds import child_seed
from steer.training.requests import ALL_LINEAR, Lora
from vectors.errors import UsageError
from vectors.storage.files import write_atomically


def problems_of_targets(lora: Lora, names: Iterable[str]) -> list[str]:
    """The target modules that no parameter of a checkpoint (by its names) belongs to, one sentence per module."""
    if lora.targets == ALL_LINEAR:
        return []
    parts = {part for name in names for part in name.split(".")}
    return [f"--lora-targets: the model has no module {target}" for target in lora.targets if target not in parts]


def adapted(model: Any, lora: Lora, seed: int) -> Any:
    """The model with a fresh adapter; all other weights are fixed. Raises UsageError for targets it does not have."""
    from peft import LoraConfig, get_peft_model

    count = len(residual.blocks(model))
    modules: Any = "all-linear" if lora.targets == ALL_LINEAR else list(lora.targets)
    layers = list(range(min(lora.first, count - 1), count)) if lora.first > 0 else None
    if layers is not None and modules == "all-linear":
        modules = _linear_names(model)  # PEFT refuses layers_to_transform with "all-linear"
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=modules, task_type="CAUSAL_LM",
        layers_to_transform=layers, exclude_modules=_without_adapter(model),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(child_seed(seed, "adapter"))
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise UsageError(
                f"the model has none of the modules {', '.join(lora.targets)}: {str(error).splitlines()[0]}",
                "name its linear modules: --lora-targets q_proj,v_proj",
            ) from error


def _without_adapter(model: Any) -> str | None:
    """A regular expression for modules that get no adapter: those of image towers, and by architecture."""
    known = residual.architecture(model)
    # Some routers are linear modules whose answer is more than a product, which an adapter would not understand.
    routers = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "router" in type(module).__name__.lower()
    }
    names = sorted({*routers, *(known.without_lora if known is not None else ())})
    patterns = [rf".*\.({'|'.join(map(re.escape, names))})"] if names else []
    if residual.text_config(model) is not model.config:
        stack = residual.decoder(model)
        prefix = next(name for name, module in model.named_modules() if module is stack)
        patterns.append(rf"(?!{re.escape(prefix)}\.).*")
    return "|".join(patterns) or None


def _linear_names(model: Any) -> list[str]:
    blocks = residual.blocks(model)
    kinds = (torch.nn.Linear, *_conv1d())
    return sorted(
        {name.rpartition(".")[2] for block in blocks for name, m in block.named_modules() if isinstance(m, kinds)}
    )


def _conv1d() -> tuple[type, ...]:
    from transformers.pytorch_utils import Conv1D

    return (Conv1D,)


def freed(model: Any) -> Any:
    """The model with all weights trainable."""
    return model.requires_grad_(True)


def save_adapter(model: Any, folder: Path, base: str, extra: Mapping[str, Any] | None = None) -> None:
    """Write the adapter in PEFT's format, with bytes that depend on its content alone: no path, no PEFT version."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            config[key] = sorted(value)  # PEFT writes sets, whose order differs between processes
    config.pop("peft_version", None)
    write_atomically(file, (json.dumps({**config, **(extra or {})}, indent=2, sort_keys=True) + "\n").encode())
