"""The file formats of steering vectors: the artifact file, and those of other tools, one per file of this folder.

_protocol.py says what a format must define. An installed package offers one under the entry point
`steer.vector_formats`.
"""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import TYPE_CHECKING

from vectors.errors import ArtifactError, UsageError
from vectors.formats._protocol import StackFormat, VectorFormat, WritableFormat
from vectors.registry.plugins import choose, discover_as

if TYPE_CHECKING:  # formats import steering.py, and steering.py imports this module
    from vectors.steering import SteeringVector


def formats() -> dict[str, VectorFormat]:
    """Every format by name, built-in or from an installed package."""
    return discover_as(VectorFormat, "vector format", __name__, "steer.vector_formats")


FIRST_ROWS = ("embeddings", "block-0")  # what the first row of a stack can be


def read(path: Path, first_row: str | None = None) -> SteeringVector:
    """Read a vector in the first format that recognises the file's content.

    `first_row`, one of `FIRST_ROWS`, says what the first row of a stack is; it is refused for other formats.

    Warns when the file says nothing of the model it belongs to. Raises ArtifactError.
    """
    known = "the formats read are " + "; ".join(f"{name} ({module.SUMMARY})" for name, module in formats().items())
    if os.path.isdir(path):
        raise ArtifactError(f"{path} is a folder, not a vector file", f"name a file in it; {known}")
    if not os.path.isfile(path):
        raise ArtifactError(f"there is no file {path}", f"check the path; {known}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}", "check its permissions") from error
    refusal: ArtifactError | None = None
    for module in formats().values():
        try:
            recognised = module.reads(path)
        except ArtifactError as error:
            # A format may refuse to open a file, such as one with pickled code; another may still recognise it.
            refusal = refusal or error
            continue
        if recognised:
            if first_row is None:
                return module.read(path)
            if not isinstance(module, StackFormat):
                raise UsageError(f"{path} is no stack of rows by layer: it says itself which layers it has", "")
            return module.read_stack(path, first_row)
    raise refusal or ArtifactError(f"{path} is in no known format of vectors", known)


def write(vector: SteeringVector, path: Path, name: str | None = None) -> str:
    """Write a vector atomically, in the format `name`, or by default in that of the path's suffix.

    Returns `sha256:` and the digest of the file. Raises UsageError for a format that can't be written, ArtifactError
    for a vector that the format can't hold, OutputError for a path that can't be written.
    """
    known = formats()
    writers = {name: module for name, module in known.items() if isinstance(module, WritableFormat)}
    if name is None:
        name = next((name for name, module in writers.items() if path.suffix.lower() in module.SUFFIXES), None)
        if name is None:
            suffixes = [f"{suffix} ({name})" for name, module in writers.items() for suffix in module.SUFFIXES]
            raise UsageError(
                f"the name {path.name} does not say which format to write",
                f"end it in {', '.join(suffixes)}, or name a format: {', '.join(writers)}",
            )
    elif choose("vector format", name, known) and name not in writers:
        raise UsageError(f"the format {name} can be read but not written", f"those written are {', '.join(writers)}")
    return writers[name].write(path, vector)
