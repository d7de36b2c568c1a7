"""The artifact file of this workbench, and safetensors files of other tools with the same tensors."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import torch

from vectors import artifact
from vectors.errors import ArtifactError
from vectors.formats._common import AGAIN, build, direction, unverified
from vectors.steering import KIND, SteeringVector

SUMMARY = "safetensors with tensors layer.{i}: the artifact file, or a bare file"
SUFFIXES = (".safetensors",)

_NAME = re.compile(r"layer\.(0|[1-9][0-9]{0,5})")


def reads(path: Path) -> bool:
    """Whether the file begins as safetensors does: the length of a JSON object, then the object."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= artifact.LARGEST_HEADER


def read(path: Path) -> SteeringVector:
    """Read a vector whose tensors are `layer.{i}`, [hidden]: float32, or any float dtype in a bare file.

    Writing the vector again gives the same bytes. Warns that the base is unverified for a file without our metadata.
    Raises ArtifactError.
    """
    return _checked(path, lambda: artifact.read(path))


def decode(content: bytes, path: Path) -> SteeringVector:
    """Read a vector from the bytes of a file; `path` names it in errors. Raises ArtifactError."""
    return _checked(path, lambda: artifact.decode(content, str(path)))


def _checked(path: Path, decoded: Callable[[], artifact.Artifact]) -> SteeringVector:
    try:
        tensors, metadata, _ = decoded()
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} has metadata that is not that of a steering vector: {error}", AGAIN) from error
    # Checked before the names: for a task vector, an error about tensor names would not help.
    if metadata is not None and metadata.get("kind") != KIND:
        kind = metadata.get("kind", "file of no kind")
        raise ArtifactError(f"{path} holds a {kind}, not a {KIND}", "name the file of a steering vector")
    names = {name: _NAME.fullmatch(name) for name in tensors}
    if strange := sorted(name for name, match in names.items() if not match):
        listed = ", ".join(strange[:3]) + (f" and {len(strange) - 3} more" if len(strange) > 3 else "")
        raise ArtifactError(
            f"{path} holds {listed}, which are not tensors of a steering vector", "they are called layer.0, layer.1, …"
        )
    if metadata is not None:
        wrong = [
            f"{name} of {path} is {t.dtype}, not float32" for name, t in tensors.items() if t.dtype != torch.float32
        ]
        if wrong:
            raise ArtifactError(wrong, AGAIN)
    layers = {int(match[1]): direction(path, name, tensors[name]) for name, match in names.items() if match}
    vector = build(path, layers, metadata or {"method": {"name": "imported", "format": "safetensors"}})
    if metadata is None:
        unverified(path, vector)
    return vector


def write(path: Path, vector: SteeringVector) -> str:
    """Write the artifact file; return its digest. Raises OutputError."""
    return vector.save(path)
