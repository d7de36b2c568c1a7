"""Weights on disk: of a safetensors file the header is read, and tensors are mapped into memory when they are used.

Headers are checked: offsets must lie inside the file without overlap, sizes must fit the shapes, and dtypes must be
known. A truncated or corrupt shard is thus detected before any work.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from vectors.documents import json_text
from vectors.documents.schema import (
    excerpt,
    list_of,
    mapping_of,
    optional,
    problems_of,
    record,
    text,
    tuple_of,
    whole,
)  # fmt: skip
from vectors.errors import ModelError, SteerError
from vectors.storage.files import write_atomically

if TYPE_CHECKING:
    import numpy as np

LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")  # the dtypes that can be merged
METADATA = "__metadata__"
_SIZE = whole(0, 2**63 - 1)
_TENSORS = mapping_of(
    record({
        "dtype": text(),
        "shape": list_of(_SIZE, longest=64),
        "data_offsets": tuple_of(_SIZE, _SIZE, wanted="[begin, end]"),
    })
)  # fmt: skip
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Entry(NamedTuple):
    """One tensor of a safetensors file. `start` is the offset of its bytes from the beginning of the file."""

    file: Path
    dtype: str  # as safetensors writes it: "BF16"
    shape: tuple[int, ...]
    start: int
    size: int  # bytes

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata. Raises ModelError for a file that is damaged."""
    try:
        size = os.path.getsize(path)
        with path.open("rb") as file:
            return parse_header(file, size, path)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror or error}", "check the path") from error
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}", "download or make it again") from error


def parse_header(
    file: IO[bytes], size: int, path: Path, largest: int = LARGEST_HEADER
) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata in the header of a safetensors file of `size` bytes, which is read no further.

    Raises OSError, and ValueError for a header of more than `largest` bytes, or one that contradicts itself or the
    file.
    """
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if length > size - 8:
        raise ValueError("its header is longer than the file")
    if length > largest:
        raise ValueError(f"its header has {length:,} bytes; at most {largest:,} are read")
    header = json_text.parse(file.read(length), deepest=None, unique=True)
    if not isinstance(header, dict):
        raise ValueError(f"its header is {excerpt(header)}, not an object")
    tensors = {name: entry for name, entry in header.items() if name != METADATA}
    # The schema names what is wrong; for the tens of thousands of tensors of a model it would take a second.
    problems = [] if all(map(_plain, tensors.values())) else problems_of(tensors, _TENSORS)
    problems += problems_of(header.get(METADATA), optional(mapping_of(text())), METADATA)
    if problems:
        raise ValueError("; ".join(problems[:3]))
    entries = {}
    for name, entry in header.items():
        if name == METADATA:
            continue
        begin, end = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        if dtype not in SIZES:
            raise ValueError(f"{name[:100]} has the unknown dtype {dtype[:20]}")
        if end - begin != math.prod(shape) * SIZES[dtype]:
            raise ValueError(f"{name[:100]} has {end - begin} bytes, which do not fit its shape {list(shape)}")
        if not begin <= end <= size - 8 - length:
            raise ValueError(f"it ends before {name[:100]} does")
        entries[name] = Entry(path, dtype, shape, 8 + length + begin, end - begin)
    last = 0
    for name, tensor in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if tensor.start < last:
            raise ValueError(f"{name[:100]} overlaps another tensor")
        last = tensor.start + tensor.size
    return entries, header.get(METADATA) or {}


def _plain(entry: Any) -> bool:
    """Whether an entry of a header is as `_TENSORS` says."""
    if type(entry) is not dict or type(entry.get("dtype")) is not str:
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if type(shape) is not list or type(offsets) is not list or len(offsets) != 2 or len(shape) > 64:
        return False
    return all(type(size) is int and 0 <= size < 2**63 for size in (*shape, *offsets))


def entries_of(paths: Iterable[Path]) -> dict[str, Entry]:
    """The tensors of several files, by name. All damaged files are reported at once. Raises ModelError."""
    all_entries: dict[str, Entry] = {}
    problems: list[str] = []
    for path in paths:
        try:
            entries = read_header(path)[0]
        except SteerError as error:
            problems += error.problems
            continue
        problems += [
            f"{path} holds {name}, which {all_entries[name].file.name} holds too"
            for name in entries
            if name in all_entries
        ]
        all_entries |= entries
    if problems:
        raise ModelError(problems, "download or make the damaged files again")
    return all_entries


def mapped(entry: Entry) -> np.ndarray:
    """The tensor's bytes as a flat, read-only array of its dtype, mapped from disk (bfloat16 and float16 as uint16)."""
    import numpy as np

    kind = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "U32": "<u4"}.get(entry.dtype)
    if kind is None:
        kind = "<u2" if SIZES[entry.dtype] == 2 else "u1"
    if not entry.elements:
        return np.empty(0, kind)
    status = entry.file.stat()
    whole = _mapped(entry.file, status.st_ino, status.st_size, status.st_mtime_ns)
    return whole[entry.start : entry.start + entry.size].view(kind)


@functools.lru_cache(maxsize=512)
def _mapped(path: Path, _inode: int, _size: int, _changed: int) -> np.ndarray:
    """A whole file, mapped once: mapping a small tensor by itself takes longer than reading it."""
    import numpy as np

    # An ndarray, because slicing a memmap takes microseconds.
    return np.asarray(np.memmap(path, np.uint8, "r"))


def header_bytes(entries: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that holds `name: (dtype, shape, bytes)` in this order, padded to eight bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_digest(path: Path) -> str:
    """`sha256:` of a file, cached by its path, inode, size and times of change, since large files take seconds."""
    from filelock import FileLock

    real = path.resolve()
    status = real.stat()
    key = f"{real} {status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steer" / "digests.json"
    digests = _cached_digests(cache)
    if key in digests:
        return digests[key]
    with real.open("rb") as file:
        digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cache}.lock", timeout=10):
            # Only the newest thousand entries are kept.
            fresh = dict(list((_cached_digests(cache) | {key: digest}).items())[-1000:])
            write_atomically(cache, json.dumps(fresh).encode())
    except (OSError, SteerError, TimeoutError):
        pass  # Without the cache, digests are only computed more often.
    return digest


def _cached_digests(cache: Path) -> dict[str, str]:
    try:
        digests = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: d for k, d in digests.items() if isinstance(d, str)} if isinstance(digests, dict) else {}
