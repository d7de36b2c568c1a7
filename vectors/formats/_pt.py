"""`.pt` files: tensors and plain values only. Nothing is ever unpickled."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from vectors.errors import ArtifactError
from vectors.formats._common import AGAIN


def load(path: Path) -> Any:
    """The tensors and plain values of a file written by torch.save; None if it is not such a file.

    The zip form is mapped into memory, so that a large file given by mistake is not read. Raises ArtifactError for a
    damaged file, and for one that needs unpickling.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}", "check the path") from error
    zipped = start == b"PK\x03\x04"
    # A protocol and a non-zero opcode follow: a safetensors file may begin with the same byte.
    pickled = len(start) > 2 and start[0] == 0x80 and 2 <= start[1] <= 5 and start[2] != 0
    if not (zipped or pickled or path.suffix.lower() in (".pt", ".pth")):
        return None
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                # torch.save never compresses; a compressed entry could unpack to any size.
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ArtifactError(f"{path} is compressed, which torch.save never does", AGAIN)
            return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        # Opened here, because torch.load would read a path that ends in .safetensors as safetensors, unchecked.
        with path.open("rb") as file:
            return torch.load(file, weights_only=True, map_location="cpu")
    except ArtifactError:
        raise
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path} holds more than tensors and plain values, or is damaged; nothing is ever unpickled",
            "unpickling can run code; if you trust the file, save only its tensors with torch.save",
        ) from error
    except Exception as error:  # on malformed bytes torch's reader raises nearly any error
        raise ArtifactError(
            f"{path} is truncated or not a file of torch.save ({type(error).__name__})", AGAIN
        ) from error


def dump(value: Any) -> bytes:
    """The bytes that torch.save writes for a value; deterministic."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
