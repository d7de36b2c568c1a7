"""The contract of a file format of steering vectors: a module with these names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:  # formats import steering.py, and steering.py imports formats
    from vectors.steering import SteeringVector


class VectorFormat(Protocol):
    """What a file of formats/ must define. Each converts its numbering of layers to ours."""

    SUMMARY: str  # one phrase for help texts and messages
    SUFFIXES: tuple[str, ...]  # files with these suffixes are written in this format; perhaps none

    def reads(self, path: Path) -> bool:
        """Whether the content of the file is of this format. Raises ArtifactError for a file that it must not open."""

    def read(self, path: Path) -> SteeringVector:
        """The vector in the file. Raises ArtifactError."""


@runtime_checkable
class WritableFormat(VectorFormat, Protocol):
    """A format that can be written too."""

    def write(self, path: Path, vector: SteeringVector) -> str:
        """Write the vector, whole or not at all; returns `sha256:` and the digest of the file.

        Raises ArtifactError for a vector that the format can't hold, OutputError.
        """


@runtime_checkable
class StackFormat(VectorFormat, Protocol):
    """A format of rows by layer whose files do not say whether the first row is the embeddings or block 0."""

    def read_stack(self, path: Path, first_row: str | None) -> SteeringVector:
        """The vector in the file, with the first row as `embeddings` or `block-0`. Raises ArtifactError."""
