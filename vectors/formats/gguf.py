"""Control vectors of llama.cpp and repeng: GGUF files of architecture `controlvector`.

`direction.{i}` acts at the output of block i, counted from 0. llama.cpp stores it at row i - 1 and fills layer i from
row i - 1, so the two shifts cancel, and layer 0 can't be expressed; repeng takes it from `hidden_states[i + 1]` and
adds it to the output of block i. (llama.cpp's own cvector-generator names what it measured at block i
`direction.{i + 1}`; such a file is read as loaders apply it.) `controlvector.layer_count` is the number of directions,
not of the model's layers; neither loader uses it.

Sources: ggml-org/llama.cpp `common/common.cpp`, `src/llama-adapter.cpp`; vgel/repeng `repeng/extract.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vectors.documents import json_text
from vectors.documents.schema import excerpt
from vectors.errors import ArtifactError
from vectors.formats._common import AGAIN, build, direction, family, imported, own, save, warn_if_all_act
from vectors.steering import SteeringVector
from vectors.storage.files import cannot_write, canonical_json, check_writable
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
        text, tensors = _parts(path)
    except Exception as error:  # on malformed bytes the reader raises nearly any error
        raise ArtifactError(f"{path} is truncated or not a GGUF file: {error}", AGAIN) from error
    if text.get("general.architecture") != ARCHITECTURE:
        architecture = text.get("general.architecture", "none")
        raise ArtifactError(
            f"{path} is a GGUF file of architecture {architecture}, not {ARCHITECTURE}",
            "name a control vector file",
        )
    layers = {}
    for name, values in tensors.items():
        match = _NAME.fullmatch(name)
        if not match or values.dtype.newbyteorder("=") != np.float32 or values.ndim != 1:
            problem = f"tensor {name} of {path} is {values.dtype} of shape {list(values.shape)}"
            raise ArtifactError(problem, "a control vector has tensors direction.1, direction.2, …: float32, [hidden]")
        # A copy in the byte order of the machine, since the file may have the other one.
        layers[int(match[1])] = direction(path, name, torch.from_numpy(values.astype(np.float32)))
    if KEY not in text:
        hint = text.get(f"{ARCHITECTURE}.model_hint")
        return imported(path, layers, "gguf", **({"model_hint": hint} if hint else {}))
    try:
        metadata = json_text.parse(text[KEY], unique=True)
    except ValueError as error:
        raise ArtifactError(f"the metadata of {path} is damaged: {error}", AGAIN) from error
    if not isinstance(metadata, dict):
        raise ArtifactError(f"the metadata of {path} is {excerpt(metadata)}, not an object", AGAIN)
    return build(path, layers, metadata)


def write(path: Path, vector: SteeringVector) -> str:
    """Write a control vector that llama.cpp and repeng load, with our metadata under the key `steer.metadata`.

    Warns when they would apply layers that do not act by default. Returns the digest. Raises ArtifactError for a
    vector with layer 0.
    """
    if 0 in vector.layers:
        rest = f"leave it out: --layers {max(1, min(vector.layers))}-{max(vector.layers)}"
        raise ArtifactError("llama.cpp refuses control vectors with a layer 0", rest if max(vector.layers) else "")
    check_writable(path)
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
    writer.add_string(KEY, canonical_json(own(vector.metadata) | {"apply": list(vector.apply)}))
    for i, values in vector.layers.items():
        writer.add_tensor(f"direction.{i}", values.contiguous().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _parts(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The string values of a GGUF file by key, and its tensors by name."""
    from gguf import GGUFReader, GGUFValueType

    class Bounded(GGUFReader):
        """A GGUFReader that raises at the end of the file, where the original goes on with empty arrays for ever."""

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends before its content does")
            return super()._get(offset, dtype, count, override_order)

    reader = Bounded(path)
    text = {
        # The last part is the text; the parts before it are lengths and the key.
        key: bytes(field.parts[-1]).decode()
        for key, field in reader.fields.items()
        if field.types and field.types[0] == GGUFValueType.STRING
    }
    return text, {tensor.name: tensor.data for tensor in reader.tensors}
