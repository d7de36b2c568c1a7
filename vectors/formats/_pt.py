"""`.pt` files: tensors and plain values only. Nothing is ever unpickled, not even by torch's restricted reader."""

from __future__ import annotations

import io
import math
import os
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vectors.errors import ArtifactError
from vectors.formats import _pickles
from vectors.formats._common import AGAIN
from vectors.formats._pickles import LARGEST, NotPlain, Storage, Strided

DIRECTORY = 4_000_000  # bytes of a zip's directory; an entry has about 100
CHECKED = 256_000_000  # bytes of a tensor up to which its checksum is compared
NO_CHECKSUM = 0  # what torch writes where checksums are switched off
MAGIC = 0x1950A86A20F9469CFC6C  # the first value of a file that is not zipped
_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip


_refused: tuple[Any, ArtifactError] | None = None  # the last file refused, since each format tries to load it


def load(path: Path) -> Any:
    """The tensors and plain values of a file written by torch.save; None if it is not such a file.

    Raises ArtifactError for a damaged file, and for one that needs unpickling.
    """
    global _refused
    try:
        status = os.stat(path)
        state = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
        if _refused is not None and _refused[0] == state:
            raise _refused[1]
        return _load(path)
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}", "check the path") from error
    except ArtifactError as error:
        _refused = (state, error)
        raise


def _load(path: Path) -> Any:
    """The tensors and plain values of a file written by torch.save; None if it is not such a file.

    Tensors are views of the file, mapped into memory, so that a large file given by mistake is not read. Raises
    ArtifactError for a damaged file, and for one that needs unpickling.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
            # A protocol and a non-zero opcode follow: a safetensors file may begin with the same byte.
            zipped = start == b"PK\x03\x04"
            pickled = len(start) > 2 and start[0] == 0x80 and 2 <= start[1] <= 5 and start[2] != 0
            if not (zipped or pickled or path.suffix.lower() in (".pt", ".pth")):
                return None
            return _from_zip(path) if zipped else _from_pickles(path)
    except NotPlain as error:
        raise ArtifactError(
            f"{path} holds more than tensors and plain values: {error}; nothing is ever unpickled",
            "unpickling can run code; if you trust the file, save only its tensors with torch.save",
        ) from error
    except (ValueError, zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError) as error:
        raise ArtifactError(f"{path} is truncated or not a file of torch.save: {error}", AGAIN) from error


def _from_zip(path: Path) -> Any:
    """The value of a zip archive: `data.pkl`, and the numbers of each storage under `data/`."""
    content = np.memmap(path, np.uint8, "c")
    _check_directory(content)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        # torch.save never compresses; a compressed entry could unpack to any size.
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries.values()):
            raise ValueError("it is compressed, which torch.save never does")
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1 or entries[pickles[0]].file_size > LARGEST:
            raise ValueError("it has no data.pkl, or a very large one")
        root = pickles[0].removesuffix("data.pkl")
    order = entries.get(root + "byteorder")
    if order is not None and order.file_size < 16 and _stored(content, order).tobytes() != sys.byteorder.encode():
        raise ValueError("it has the byte order of another kind of machine")
    value = _pickles.read(io.BytesIO(_stored(content, entries[pickles[0]]).tobytes()))

    def numbers(storage: Storage) -> np.ndarray:
        entry = entries.get(f"{root}data/{storage.key}")
        if entry is None:
            raise ValueError(f"the numbers of the tensor {storage.key[:40]!r} are missing")
        return _stored(content, entry)

    return _with_tensors(value, numbers)


def _stored(content: np.ndarray, entry: zipfile.ZipInfo) -> np.ndarray:
    """The bytes of an entry that is not compressed, as a part of the file's. Raises ValueError."""
    header = content[entry.header_offset : entry.header_offset + 30].tobytes()
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise ValueError("its directory does not fit its content")
    name, extra = struct.unpack("<HH", header[26:])
    start = entry.header_offset + 30 + name + extra
    stored = content[start : start + entry.file_size]
    if len(stored) < entry.file_size:
        raise ValueError("it ends before its content does")
    if len(stored) <= CHECKED and entry.CRC != NO_CHECKSUM and zlib.crc32(stored.data) != entry.CRC:
        raise ValueError(f"its content was changed: the checksum of {entry.filename[:60]} does not match")
    return stored


def _from_pickles(path: Path) -> Any:
    """The value of a file of torch before 1.6, or one written without zipping: five pickles, then the numbers."""
    content = np.memmap(path, np.uint8, "c") if os.path.getsize(path) else np.empty(0, np.uint8)
    file = io.BytesIO(bytes(content[:LARGEST]))
    if _pickles.read(file) != MAGIC:
        raise NotPlain("a pickle that torch.save did not write")
    _pickles.read(file)
    machine = _pickles.read(file)
    if not isinstance(machine, dict) or machine.get("little_endian") is not (sys.byteorder == "little"):
        raise ValueError("it has the byte order of another kind of machine")
    value, keys = _pickles.read(file), _pickles.read(file)
    starts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    _pickles.mapped(value, lambda tensor: sizes.setdefault(tensor.storage.key, _bytes_of(tensor.storage)))
    at = file.tell()
    for key in keys if isinstance(keys, list) else ():
        size = sizes.get(key) if isinstance(key, str) else None
        if size is None:
            raise NotPlain("tensors inside of other values")
        starts[key] = at + 8
        at += 8 + size
    if at > len(content):
        raise ValueError("it ends before its content does")

    def numbers(storage: Storage) -> np.ndarray:
        if storage.key not in starts:
            raise ValueError("the numbers of a tensor are missing")
        return content[starts[storage.key] : starts[storage.key] + _bytes_of(storage)]

    return _with_tensors(value, numbers)


def _with_tensors(value: Any, numbers: Any) -> Any:
    storages: dict[Storage, Tensor] = {}

    def tensor_of(view: Strided) -> Tensor:
        storage = view.storage
        if storage not in storages:
            content = numbers(storage)
            if len(content) != _bytes_of(storage):
                raise ValueError(f"a tensor of it has {len(content)} bytes, not {_bytes_of(storage)}")
            dtype = _DTYPES[storage.kind]
            if content.ctypes.data % dtype.itemsize:
                content = content.copy()
            storages[storage] = torch.frombuffer(content, dtype=dtype) if len(content) else torch.empty(0, dtype=dtype)
        last = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True))
        if 0 not in view.size and last >= storage.elements:
            raise ValueError("a tensor of it lies beyond its numbers")
        if math.prod(view.size) >= 2**62:
            raise ValueError("a tensor in it has an impossible shape")
        return storages[storage].as_strided(view.size, view.stride, view.offset if storage.elements else 0)

    return _pickles.mapped(value, tensor_of)


def _bytes_of(storage: Storage) -> int:
    if storage.kind not in _DTYPES:
        raise NotPlain(f"numbers of the kind {storage.kind[:40]}")
    return storage.elements * _DTYPES[storage.kind].itemsize


def _check_directory(content: np.ndarray) -> None:
    """Refuse a zip whose directory would take long to read. Raises ValueError."""
    end = bytes(content[-66_000:])
    at = end.rfind(b"PK\x05\x06")
    if at < 0 or len(end) < at + 22:
        raise ValueError("it ends before its content does")
    size = struct.unpack("<I", end[at + 12 : at + 16])[0]
    locator = end[at - 20 : at] if at >= 20 else b""
    if locator.startswith(b"PK\x06\x07"):
        start = struct.unpack("<Q", locator[8:16])[0]
        record = bytes(content[start : start + 56]) if start < len(content) else b""
        size = struct.unpack("<Q", record[40:48])[0] if len(record) == 56 else DIRECTORY + 1
    if size > DIRECTORY:
        raise ValueError(f"its directory has more than {DIRECTORY:,} bytes")


def dump(value: Any) -> bytes:
    """The bytes that torch.save writes for a value; deterministic."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
