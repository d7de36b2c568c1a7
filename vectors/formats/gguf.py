"""Control vectors of llama.cpp and repeng: GGUF files of architecture `controlvector`.

`direction.{i}` acts at the output of block i, counted from 0. llama.cpp stores it at row i - 1 and fills layer i from
row i - 1, so the two shifts cancel, and layer 0 can't be expressed; repeng takes it from `hidden_states[i + 1]` and
adds it to the output of block i. (llama.cpp's own cvector-generator names what it measured at block i
`direction.{i + 1}`; such a file is read as loaders apply it.) `controlvector.layer_count` is the number of directions,
not of the model's layers; neither loader uses it.

Sources: ggml-org/llama.cpp `common/common.cpp`, `src/llama-adapter.cpp`; vgel/repeng `repeng/extract.py`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import torch

from vectors.artifact import parse_metadata
from vectors.documents.schema import MOST
from vectors.errors import ArtifactError
from vectors.formats import _gguf
from vectors.formats._common import AGAIN, build, direction, family, imported, save, warn_if_all_act, without_added_keys
from vectors.steering import SteeringVector
from vectors.storage.files import cannot_write, canonical_json, require_writable
from vectors.storage.locks import temporary_folder

SUMMARY = "control vectors of llama.cpp and repeng"
SUFFIXES = (".gguf",)

ARCHITECTURE = "controlvector"
KEY = "steer.metadata"
_NAME = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")


def reads(path: Path) -> bool:
    """Whether the file begins as GGUF does."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def read(path: Path) -> SteeringVector:
    """Read a control vector: tensors `direction.{i}`, float32, [hidden].

    A file written by this workbench keeps all its metadata; any other keeps its model hint, with a warning that its
    base is unverified. Raises ArtifactError.
    """
    try:
        content = np.memmap(path, np.uint8, "r")
        header = _gguf.header(content)
        text = {key: value for key, value in header.values.items() if isinstance(value, str)}
        if (architecture := text.get("general.architecture", "none")) != ARCHITECTURE:
            raise ArtifactError(
                f"{path} is a GGUF file of architecture {architecture[:60]}, not {ARCHITECTURE}",
                "name a control vector file",
            )
        _require_directions(path, header)
        layers = {
            # A copy in the byte order of the machine, since the file may have the other one.
            int(name.partition(".")[2]): direction(path, name, torch.from_numpy(_gguf.floats(content, header, name)))
            for name in header.tensors
        }
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} is truncated or not a GGUF file: {error}", AGAIN) from error
    if KEY not in text:
        hint = text.get(f"{ARCHITECTURE}.model_hint")
        return imported(path, layers, "gguf", **({"model_hint": hint} if hint else {}))
    return build(path, layers, parse_metadata(text[KEY], path, AGAIN))


def write(path: Path, vector: SteeringVector) -> str:
    """Write a control vector that llama.cpp and repeng load, with our metadata under the key `steer.metadata`.

    Warns when they would apply layers that do not act by default. Returns the digest. Raises ArtifactError for a
    vector with layer 0.
    """
    if 0 in vector.layers:
        rest = f"leave it out: --layers {max(1, min(vector.layers))}-{max(vector.layers)}"
        raise ArtifactError("llama.cpp refuses control vectors with a layer 0", rest if max(vector.layers) else "")
    require_writable(path)
    warn_if_all_act(path, vector, "llama.cpp")
    try:
        with temporary_folder(path) as folder:  # GGUFWriter takes a path, not an open file
            _write(str(folder / path.name), vector)
            content = (folder / path.name).read_bytes()
    except OSError as error:
        raise cannot_write(path, error) from error
    return save(path, content)


def _write(name: str, vector: SteeringVector) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(name, ARCHITECTURE)
    # repeng refuses a file without a hint, and the writer leaves out empty strings.
    writer.add_string(f"{ARCHITECTURE}.model_hint", family(vector.base) or "unknown")
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vector.layers))
    writer.add_string(KEY, canonical_json(without_added_keys(vector.metadata) | {"apply": list(vector.apply)}))
    for i, values in vector.layers.items():
        writer.add_tensor(f"direction.{i}", values.contiguous().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _require_directions(path: Path, header: _gguf.Header) -> None:
    """Refuse tensors that are no directions, or lie over each other. Raises ArtifactError."""
    problems = []
    last, before = 0, ""
    for name, tensor in sorted(header.tensors.items(), key=lambda item: item[1].offset):
        if not _NAME.fullmatch(name) or tensor.kind != _gguf.F32 or len(tensor.shape) != 1:
            kind = "F32" if tensor.kind == _gguf.F32 else f"of type {tensor.kind}"
            problems.append(f"tensor {name[:60]} of {path} is {kind}, of shape {list(tensor.shape)[::-1]}")
        elif tensor.offset < last:
            problems.append(f"tensor {name} of {path} overlaps {before}")
        last, before = tensor.offset + 4 * math.prod(tensor.shape), name
    if problems:
        raise ArtifactError(
            problems[:MOST], "a control vector has tensors direction.1, direction.2, …: float32, [hidden]"
        )
