"""Loading a model for measuring: safetensors only, on the device and in the dtype asked for, with the reasons."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import nn

from vectors import references
from vectors.errors import ModelError, UsageError
from vectors.references import ModelSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadedModel(NamedTuple):
    """A model ready for measuring, and what it is. `choice` says which device and dtype were chosen, and why."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    source: ModelSource
    identity: dict[str, Any]
    choice: str


def load(reference: str, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Load a causal language model and its tokenizer. Raises ModelError, UsageError."""
    chosen_device, device_reason = choose_device(device)
    chosen_dtype, dtype_reason = choose_dtype(dtype, chosen_device)
    source = references.resolve(reference)
    identity = references.identity(source)

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        # The resolved folder, so that files of two revisions never mix; safetensors, so that nothing is unpickled.
        model = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=chosen_dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the model {source} can't be loaded: {reason}",
            "the folder needs config.json, safetensors weights and a tokenizer of a decoder-only model",
        ) from error
    finally:
        if shown:
            enable_progress_bar()
    model.to(chosen_device).eval().requires_grad_(False)
    model.steer_base = identity  # so that `steered` need not read the folder again
    choice = f"{chosen_device} ({device_reason}), {str(chosen_dtype).removeprefix('torch.')} ({dtype_reason})"
    return LoadedModel(model, tokenizer, source, identity, choice)


def choose_device(device: str) -> tuple[torch.device, str]:
    """The device and the reason. Raises UsageError for one that isn't there."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), "found"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "found"
        return torch.device("cpu"), "no GPU found"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"the device {device!r} is not available", "use --device auto, cpu, cuda, cuda:N or mps"
        ) from error
    return chosen, "asked for"


def choose_dtype(dtype: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype and the reason. Raises UsageError for an unknown one."""
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32, "exact, and the fastest on most CPUs"
        return torch.bfloat16, "half the memory, same range"
    if dtype not in DTYPES:
        raise UsageError(f"there is no dtype {dtype!r}", f"use --dtype auto, {', '.join(DTYPES)}")
    return DTYPES[dtype], "asked for"


def base_of(model: nn.Module) -> dict[str, Any] | None:
    """The identity of a model that someone else loaded, from the folder its configuration names; None if unknown."""
    path = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not path:
        return None
    try:
        revision = getattr(model.config, "_commit_hash", None)
        from pathlib import Path

        if not Path(path).is_dir():
            from huggingface_hub import snapshot_download

            path = snapshot_download(path, revision=revision, local_files_only=True)
        return references.identity(references.resolve(path))
    except (ModelError, OSError, ValueError):
        return None
