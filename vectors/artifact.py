"""The artifact file: safetensors with exactly one metadata key, so that the bytes are a function of the content.

safetensors writes metadata keys in random order, so everything is canonical JSON under one key, `steer`. The entry
`checksum` in it covers everything else in the file, so that a reader detects damage.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from vectors.documents import json_text
from vectors.documents.schema import excerpt
from vectors.errors import ArtifactError, shortened
from vectors.storage.files import canonical_json, digest_bytes, write_atomically
from vectors.weights import Entry, parse_header

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
KEY = "steer"
LARGEST_OF_A_VECTOR = 4_000_000  # bytes of the header; that of a vector of 1,000 layers has about 150,000
AGAIN = "make it again with `steer extract`, or copy it again from where it came"

HeaderCheck = Callable[[Mapping[str, Entry], "dict[str, Any] | None"], None]


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


def read(path: Path, check: HeaderCheck | None = None) -> Artifact:
    """Read and check an artifact file, as `decode` does; its header is checked before anything else is read."""
    try:
        with path.open("rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size, path, check)
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}", "check the path") from error


def decode(content: bytes, path: str, check: HeaderCheck | None = None) -> Artifact:
    """Check the bytes of an artifact: structure, schema, checksum, finite values. `path` names them in errors.

    `check` is called with the header's tensors and its metadata before a tensor is read, and may refuse them. A
    safetensors file without the `steer` key is returned with `metadata` None. Raises ArtifactError.
    """
    return _read(io.BytesIO(content), len(content), Path(path), check)


def _read(file: IO[bytes], size: int, path: Path, check: HeaderCheck | None) -> Artifact:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        entries, strings = parse_header(file, size, path, LARGEST_OF_A_VECTOR)
    except ValueError as error:
        raise ArtifactError(f"{path} is truncated or no safetensors file: {error}", AGAIN) from error
    metadata = metadata_of(strings, path)
    if check is not None:
        check(entries, metadata)
    try:
        file.seek(0)
        content = file.read()
        tensors = load(content)
    except (SafetensorError, ValueError, struct.error) as error:
        raise ArtifactError(f"{path} is truncated or no safetensors file: {error}", AGAIN) from error
    except (KeyError, OverflowError, RuntimeError, TypeError) as error:
        raise ArtifactError(
            f"{path} holds a tensor of a dtype or shape that torch does not support: {error}", AGAIN
        ) from error
    if metadata is not None and metadata.get("checksum") != _checksum(metadata, tensors):
        raise ArtifactError(f"{path} was changed after it was written: its checksum does not match", AGAIN)
    broken = [
        name
        for name, tensor in tensors.items()
        if not bool(torch.isfinite(tensor if tensor.is_complex() else tensor.float()).all())
    ]
    if broken:
        raise ArtifactError(f"{path} holds values that are not finite, in {shortened(sorted(broken))}", AGAIN)
    return Artifact(tensors, metadata, digest_bytes(content))


def parse_metadata(text: str, path: Path, hint: str = AGAIN) -> dict[str, Any]:
    """The JSON object that a file holds as metadata; its fields are not checked here. Raises ArtifactError."""
    try:
        metadata = json_text.parse(text, unique=True)
    except ValueError as error:
        raise ArtifactError(f"the metadata of {path} is damaged: {error}", hint) from error
    if not isinstance(metadata, dict):
        raise ArtifactError(f"the metadata of {path} is {excerpt(metadata)}, not an object", hint)
    return metadata


def metadata_of(strings: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """The JSON object under `steer` among the metadata of a file; None for a file of another tool.

    Raises ArtifactError for metadata that is damaged, or of another schema; its fields are not checked here.
    """
    if KEY not in strings:
        if any('"checksum":"sha256:' in value for value in strings.values()):
            raise ArtifactError(f"{path} was changed after it was written: its metadata is under another key", AGAIN)
        return None
    metadata = parse_metadata(strings[KEY], path)
    schema = metadata.get("schema")
    if isinstance(schema, bool) or schema != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {excerpt(schema)}; this version reads {SCHEMA}", "upgrade steer-workbench"
        )
    return metadata
