"""Shared by the formats: building a vector from the untrusted content of a file, with errors that name the file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vectors.documents.artifacts import HIGHEST_LAYER
from vectors.documents.schema import excerpt
from vectors.errors import ArtifactError
from vectors.registry.layers import spans
from vectors.steering import KIND, SteeringVector, problems_of_metadata
from vectors.storage.files import digest_bytes, require_writable, write_atomically

AGAIN = "make it again, or copy it again from where it came"
_ADDED_BY_ENCODE = ("schema", "checksum", "kind", "hidden_size")


def save(path: Path, content: bytes) -> str:
    """Write a whole file atomically; return its digest. Raises OutputError."""
    require_writable(path)
    write_atomically(path, content)
    return digest_bytes(content)


def without_added_keys(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata without the keys that the artifact file adds on writing."""
    return {key: value for key, value in metadata.items() if key not in _ADDED_BY_ENCODE}


def dense(path: Path, what: str, value: object) -> Tensor:
    """Check that a value of a file is a dense floating-point tensor backed by data. Raises ArtifactError."""
    if not isinstance(value, Tensor):
        raise ArtifactError(f"{path}: {what} is of type {type(value).__name__}, not a tensor", AGAIN)
    ordinary = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
    if not ordinary or not value.is_floating_point():
        raise ArtifactError(f"{path}: {what} holds {value.dtype}, not dense floating-point values", AGAIN)
    # A few bytes with a stride of 0 can claim terabytes, which would be allocated on the first operation.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ArtifactError(f"{path}: {what} has shape {list(value.shape)} but not that much data", AGAIN)
    return value.detach()


def direction(path: Path, what: str, value: object) -> Tensor:
    """A value of a file as a direction: a float32 copy, [hidden]; a leading dimension of 1 is dropped.

    Raises ArtifactError.
    """
    value = dense(path, what, value)
    if value.ndim == 2 and value.shape[0] == 1:
        value = value[0]
    if value.ndim != 1:
        raise ArtifactError(f"{path}: {what} has shape {list(value.shape)}, not [hidden]", AGAIN)
    return value.to(torch.float32, copy=True)


def build(path: Path, layers: Mapping[int, Tensor], metadata: Mapping[str, Any]) -> SteeringVector:
    """The vector of a file, after a check of its untrusted metadata. Raises ArtifactError that names the file."""
    require_kind(path, metadata)
    problems = problems_of_metadata(metadata)
    if not problems and (missing := sorted(set(metadata.get("apply", ())) - set(layers))):
        problems.append(f"it acts at layer {spans(missing)}, which it lacks (it has {spans(layers)})")
    if any(i > HIGHEST_LAYER for i in layers):
        problems.append(f"it has a layer {max(layers)}; no model has more than {HIGHEST_LAYER}")
    size = next(iter(layers.values())).numel() if layers else 0
    if not problems and metadata.get("hidden_size", size) != size:
        problems.append(f"its metadata has hidden size {metadata['hidden_size']}, its tensors {size}")
    if not problems:
        try:
            return SteeringVector(layers, without_added_keys(metadata))
        except ArtifactError as error:
            problems = list(error.problems)
    raise ArtifactError([f"{path}: {problem}" for problem in problems], AGAIN)


def require_kind(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse the metadata of another kind of artifact. Raises ArtifactError."""
    kind = metadata.get("kind", KIND)
    if kind == "task-vector":
        raise ArtifactError(f"{path} holds a {kind}, not a {KIND}", "use it with `steer merge` or `steer apply`")
    if kind == "probe":
        raise ArtifactError(
            f"{path} holds a probe, not a {KIND}: it reads activations and steers nothing",
            "use it with `steer probe`, or as a condition behind @when: or @while:",
        )
    if kind != KIND:
        raise ArtifactError(
            f"{path} holds a file of the kind {excerpt(kind)}, not a {KIND}", "name the file of a steering vector"
        )


def imported(path: Path, layers: Mapping[int, Tensor], format: str, **details: str | int) -> SteeringVector:
    """A vector of another tool, whose `method` records the format and `details`. Warns that its base is unverified."""
    vector = build(path, layers, {"method": {"name": "imported", "format": format, **details}})
    unverified(path, vector)
    return vector


def unverified(path: Path, vector: SteeringVector) -> None:
    """Warn that a file records neither its base model nor the layers that act by default."""
    rows = (
        f"It does not say whether the first of its {vector.rows} rows is the embeddings or block 0: it fits only "
        "models of one layer less. "
        if vector.rows is not None
        else ""
    )
    warnings.warn(
        f"{path} does not say which model it belongs to: its base is unverified. {rows}"
        f"It acts at every layer it holds ({spans(vector.layers)}) unless layers are named.",
        stacklevel=2,
    )


def warn_if_all_act(path: Path, vector: SteeringVector, tool: str) -> None:
    """Warn when `tool`, which applies every layer of a file, would apply layers that do not act by default here."""
    if set(vector.apply) != set(vector.layers):
        warnings.warn(
            f"{tool} applies every layer of {path} ({spans(vector.layers)}), not only those that act by default "
            f"({spans(vector.apply)}): write only these, --layers {spans(vector.apply)}.",
            stacklevel=2,
        )


def family(base: Mapping[str, Any]) -> str:
    """The model family of a base, as configurations name it: `llama` for `LlamaForCausalLM`. Empty if unknown."""
    return re.sub(r"(ForCausalLM|ForConditionalGeneration|LMHeadModel)$", "", str(base.get("architecture", ""))).lower()
