"""The artifact file of this workbench, and safetensors files of other tools with the same tensors."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vectors import artifact
from vectors.documents.artifacts import HIGHEST_LAYER
from vectors.documents.schema import MOST
from vectors.errors import ArtifactError, shortened
from vectors.formats._common import AGAIN, build, direction, require_kind, unverified
from vectors.steering import SteeringVector
from vectors.weights import LARGEST_HEADER, Entry

SUMMARY = "safetensors with tensors layer.{i}: the artifact file, or a bare file"
SUFFIXES = (".safetensors",)

_NAME = re.compile(r"layer\.(0|[1-9][0-9]{0,5})")


def reads(path: Path) -> bool:
    """Whether the file begins as safetensors does: the length of a JSON object, then the object."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= LARGEST_HEADER


def read(path: Path) -> SteeringVector:
    """Read a vector whose tensors are `layer.{i}`, [hidden]: float32, or any float dtype in a bare file.

    Writing the vector again gives the same bytes. A file of something else, such as the weights of a model, is refused
    by its header. Warns that the base is unverified for a file without our metadata. Raises ArtifactError.
    """
    return _vector(path, artifact.read(path, lambda entries, metadata: _require_vector(path, entries, metadata)))


def decode(content: bytes, path: Path) -> SteeringVector:
    """Read a vector from the bytes of a file; `path` names it in errors. Raises ArtifactError."""
    return _vector(
        path,
        artifact.decode(content, str(path), lambda entries, metadata: _require_vector(path, entries, metadata)),
    )


def _require_vector(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, Any] | None) -> None:
    """Refuse, by the header alone, what is no steering vector. Raises ArtifactError."""
    # Checked before the names: for a task vector, an error about tensor names would not help.
    if metadata is not None:
        require_kind(path, {"kind": None} | dict(metadata))
    if strange := sorted(name for name in entries if not _NAME.fullmatch(name)):
        names = [name if len(name) <= 100 else name[:100] + "…" for name in strange]
        raise ArtifactError(
            f"{path} holds {shortened(names)}, which are not tensors of a steering vector",
            "they are called layer.0, layer.1, …",
        )
    if len(entries) > HIGHEST_LAYER + 1:
        raise ArtifactError(
            f"{path} holds {len(entries)} tensors; no model has more than {HIGHEST_LAYER} layers", AGAIN
        )
    allowed = ("F32",) if metadata is not None else ("F32", "F64", "F16", "BF16")
    problems = []
    for name, entry in entries.items():
        if entry.dtype not in allowed:
            problems.append(f"{name} of {path} is {entry.dtype}, not {' or '.join(allowed)}")
        if len(entry.shape) not in (1, 2) or (len(entry.shape) == 2 and entry.shape[0] != 1) or not entry.elements:
            problems.append(f"{name} of {path} has shape {list(entry.shape)[:8]}, not [hidden]")
    sizes = sorted({entry.elements for entry in entries.values()})
    if len(sizes) > 1 and not problems:
        problems.append(f"the layers of {path} have different hidden sizes: {shortened([str(size) for size in sizes])}")
    if problems:
        raise ArtifactError(problems[:MOST], AGAIN)


def _vector(path: Path, read: artifact.Artifact) -> SteeringVector:
    layers = {int(name.partition(".")[2]): direction(path, name, tensor) for name, tensor in read.tensors.items()}
    metadata = read.metadata
    vector = build(path, layers, metadata or {"method": {"name": "imported", "format": "safetensors"}})
    if metadata is None:
        unverified(path, vector)
    return vector


def write(path: Path, vector: SteeringVector) -> str:
    """Write the artifact file; return its digest. Raises OutputError."""
    return vector.save(path)
