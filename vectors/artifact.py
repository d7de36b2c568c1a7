"""The artifact file: safetensors with exactly one metadata key, so that the bytes are a function of the content.

safetensors writes metadata keys in random order, so everything is canonical JSON under one key, `steer`. The entry
`checksum` in it covers everything else in the file, so that a reader detects damage.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vectors.errors import ArtifactError
from vectors.storage.files import canonical_json, digest_bytes, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
KEY = "steer"
LARGEST_HEADER = 100_000_000  # the limit of the safetensors format, in bytes


class Artifact(NamedTuple):
    """The content of a file: its tensors, its metadata (None for safetensors of other tools), and the file's digest."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] | None
    digest: str


def _checksum(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The digest of the metadata (without `checksum`) and of every tensor with its name, dtype and shape."""
    import torch

    rest = {key: value for key, value in metadata.items() if key != "checksum"}
    parts = [canonical_json(rest).encode()]
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        # As plain bytes, because NumPy has no bfloat16.
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        parts += [f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), content]
    return digest_bytes(*parts)


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """The bytes of an artifact: the same tensors and metadata give the same bytes.

    Raises ArtifactError for metadata that JSON can't represent, such as a NaN.
    """
    import torch
    from safetensors.torch import save

    complete = dict(metadata) | {"schema": SCHEMA}
    try:
        complete["checksum"] = _checksum(complete, tensors)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"the metadata is not JSON: {error}", "use plain, finite values") from error
    # Copied, because safetensors refuses tensors that share memory.
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return save(copies, {KEY: canonical_json(complete)})


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Write an artifact atomically and return its digest. Raises OutputError."""
    content = encode(tensors, metadata)
    write_atomically(path, content)
    return digest_bytes(content)


def read(path: Path) -> Artifact:
    """Read and check an artifact file (`decode`). Raises ArtifactError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}", "check the path") from error
    return decode(content, str(path))


def decode(content: bytes, path: str) -> Artifact:
    """Check the bytes of an artifact: structure, schema, checksum, finite values. `path` names them in errors.

    A safetensors file without the `steer` key is returned with `metadata` None. Raises ArtifactError.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    hint = "make it again with `steer extract`, or copy it again from where it came"
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    except (SafetensorError, ValueError, struct.error) as error:
        raise ArtifactError(f"{path} is truncated or no safetensors file: {error}", hint) from error
    except (KeyError, OverflowError, RuntimeError, TypeError) as error:
        raise ArtifactError(
            f"{path} holds a tensor of a dtype or shape that torch does not support: {error}", hint
        ) from error
    entries = header.get("__metadata__") or {}
    text = entries.get(KEY)
    metadata: dict[str, Any] | None = None
    if text is not None:
        try:
            metadata = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"the metadata of {path} is not JSON: {error}", hint) from error
        if not isinstance(metadata, dict) or metadata.get("schema") != SCHEMA:
            schema = metadata.get("schema") if isinstance(metadata, dict) else metadata
            raise ArtifactError(f"{path} has schema {schema!r}; this version reads {SCHEMA}", "upgrade steer-workbench")
        if metadata.get("kind") == "task-vector":
            raise ArtifactError(
                f"{path} holds a task-vector, not a steering-vector", "use it with `steer merge` or `steer apply`"
            )
        try:
            expected = _checksum(metadata, tensors)
        except (ValueError, RecursionError) as error:  # Python's reader takes NaN and lone surrogates, JSON does not
            raise ArtifactError(f"the metadata of {path} is not JSON: {error}", hint) from error
        if metadata.get("checksum") != expected:
            raise ArtifactError(f"{path} was changed after it was written: its checksum does not match", hint)
    elif any('"checksum":"sha256:' in value for value in entries.values()):
        raise ArtifactError(f"{path} was changed after it was written: its metadata is under another key", hint)
    broken = [
        name
        for name, tensor in tensors.items()
        if not bool(torch.isfinite(tensor if tensor.is_complex() else tensor.float()).all())
    ]
    if broken:
        raise ArtifactError(f"{path} holds values that are not finite, in {', '.join(sorted(broken))}", hint)
    return Artifact(tensors, metadata, digest_bytes(content))
