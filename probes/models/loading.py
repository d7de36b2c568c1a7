"""Loading a model for measuring: safetensors only, on a device and in a dtype that are given or chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from probes.models.markers import given_markers
from vectors import references
from vectors.errors import ModelError, SteerError, UsageError, collecting
from vectors.references import ModelSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadedModel(NamedTuple):
    """A loaded model with its tokenizer, source and identity; `choice` names its device and dtype, and why these."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    source: ModelSource
    identity: dict[str, Any]
    choice: str


class OpenedModel(NamedTuple):
    """A model whose weights are not loaded yet: its source, identity, configuration and tokenizer."""

    source: ModelSource
    identity: dict[str, Any]
    config: Any  # transformers.PretrainedConfig
    tokenizer: Any  # transformers.PreTrainedTokenizerBase


def open_model(reference: str | Path) -> OpenedModel:
    """Resolve a causal language model and read everything but its weights. Raises ModelError."""
    source = references.resolve(str(reference))
    if not references.weight_files(source.path):
        raise references.without_safetensors(str(reference), source.path)
    identity = references.identity(source)

    from transformers import AutoConfig, AutoTokenizer

    with _reading(source):
        config = AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    return OpenedModel(source, identity, config, tokenizer)


def load(
    reference: str | Path | OpenedModel,
    device: str = "auto",
    dtype: str = "auto",
    markers: Mapping[str, Sequence[str]] | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer. Raises ModelError, UsageError.

    `markers` are those of its sections (`vectors.language.markers`), for kinds whose known forms are not the model's.
    """
    chosen_device, device_reason = choose_device(device)
    chosen_dtype, dtype_reason = choose_dtype(dtype, chosen_device)
    source, identity, config, tokenizer = reference if isinstance(reference, OpenedModel) else open_model(reference)
    found = given_markers(tokenizer, markers)

    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    was_enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with memory_reported(), _reading(source):
            # The resolved folder, so that files of two revisions never mix; safetensors, so that nothing is unpickled.
            model = model_class(config).from_pretrained(
                source.path, dtype=chosen_dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
            model.to(chosen_device).eval().requires_grad_(False)
    finally:
        if was_enabled:
            enable_progress_bar()
    model.steer_base = identity  # so that `steered` need not read the folder again
    model.steer_markers = found
    choice = f"{chosen_device} ({device_reason}), {str(chosen_dtype).removeprefix('torch.')} ({dtype_reason})"
    return LoadedModel(model, tokenizer, source, identity, choice)


def model_class(config: Any) -> Any:
    """The class of transformers that loads a model of this configuration, with its text decoder and head.

    A vision-language model is loaded whole, so that its parameters have the names of its checkpoint.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    wraps = config.get_text_config(decoder=True) is not config
    return (
        AutoModelForImageTextToText
        if wraps and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        else (AutoModelForCausalLM)
    )


@contextlib.contextmanager
def _reading(source: ModelSource) -> Iterator[None]:
    """A context in which the errors of transformers about a folder that it can't read become a ModelError."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if _is_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the model {source} can't be loaded: {reason}",
            "the folder needs config.json, safetensors weights and a tokenizer of a decoder-only model",
        ) from error


@contextlib.contextmanager
def memory_reported() -> Iterator[None]:
    """A context in which running out of memory, which torch reports as a RuntimeError, becomes a ModelError."""
    try:
        yield
    except RuntimeError as error:
        if not _is_memory(error):
            raise
        raise ModelError(
            f"out of memory: {str(error).strip().splitlines()[0]}",
            "use a smaller model, --dtype bfloat16, fewer --layers, or shorter texts",
        ) from error


def _is_memory(error: Exception) -> bool:
    """Whether torch ran out of memory. On a CPU it raises a plain RuntimeError, known only by its message."""
    text = str(error)
    reported = isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text
    return isinstance(error, RuntimeError) and reported


def choose_device(device: str) -> tuple[torch.device, str]:
    """The device and the reason for it. Raises UsageError for a device that is not available."""
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
    """The dtype and the reason for it. Raises UsageError for an unknown dtype."""
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
        if not Path(path).is_dir():
            from huggingface_hub import snapshot_download

            path = snapshot_download(path, revision=revision, local_files_only=True)
        return references.identity(references.resolve(path))
    except (ModelError, OSError, ValueError):
        return None


def require_devices(device: str, dtype: str, errors: list[SteerError]) -> None:
    """Collect what is wrong with a device and a dtype."""
    with collecting(errors):
        choose_device(device)
    with collecting(errors):
        choose_dtype(dtype, torch.device("cpu"))
