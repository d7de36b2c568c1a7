"""Writing a task vector piece by piece.

The header of a safetensors file comes first but is complete only after the last tensor, so space is reserved for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os.path
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vectors.artifact import KEY, SCHEMA
from vectors.errors import OutputError
from vectors.storage.files import NewFile, cannot_write, canonical_json, require_writable, write_atomically
from vectors.task import KIND, SHARD, checksum
from vectors.weights import Entry, header_bytes


class Writer:
    """One file of a task vector, under a temporary name until `commit`. A context manager, which removes it on failure.

    `room` is the space reserved for the header, in bytes; the rest of it is filled with spaces, as the format allows.
    """

    def __init__(self, path: Path, room: int) -> None:
        self.path, self.room = path, room
        self.entries: dict[str, Entry] = {}
        self.digests: dict[str, str] = {}

    def __enter__(self) -> Writer:
        self._new = NewFile(self.path)
        self.file = self._new.file
        self.file.seek(self.room)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._new.discard()

    def begin(self) -> None:
        """Begin a tensor."""
        self.start, self.state = self.file.tell(), hashlib.sha256()

    def write(self, piece: Any) -> None:
        """Append bytes to the current tensor. Raises OutputError."""
        try:
            self.file.write(piece)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.state.update(piece)

    def end(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Finish the current tensor with its name, dtype (as safetensors writes it) and shape."""
        size = self.file.tell() - self.start
        self.entries[name] = Entry(self.path, dtype, tuple(int(n) for n in shape), self.start, size)
        self.digests[name] = "sha256:" + self.state.hexdigest()

    def drop(self) -> None:
        """Discard the current tensor."""
        self.file.seek(self.start)
        self.file.truncate()

    def add(self, name: str, dtype: str, array: Any) -> None:
        """Write a whole tensor at once. Raises OutputError."""
        self.begin()
        self.write(memoryview(array).cast("B") if array.size else b"")
        self.end(name, dtype, array.shape)

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Write the header and flush to disk; the file keeps its temporary name. Raises OutputError."""
        complete = dict(metadata) | {"kind": KIND, "schema": SCHEMA}
        complete["checksum"] = checksum(complete, self.entries, self.digests)
        layout = {name: (entry.dtype, entry.shape, entry.size) for name, entry in self.entries.items()}
        header = header_bytes(layout, {KEY: canonical_json(complete)})
        if len(header) > self.room:
            raise OutputError(f"the header of {self.path.name} takes {len(header)} bytes", "report this as a defect")
        text = header[8:].ljust(self.room - 8)
        try:
            self.file.seek(0)
            self.file.write(struct.pack("<Q", len(text)) + text)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._new.flush()

    def commit(self) -> None:
        """Rename the finished file to its final name. Raises OutputError."""
        self._new.commit()


def room(parameters: Mapping[str, Sequence[int]], metadata: Mapping[str, Any]) -> int:
    """An upper bound on the header's size in bytes for these parameters, in any storage."""
    names = sum(3 * (len(json.dumps(name)) + 150) + 2 * (len(name) + 80) for name in parameters)
    return (len(canonical_json(metadata)) * 2 + names + 4096) // 4096 * 4096 + 4096


def shards(sizes: Mapping[str, int], largest: int = SHARD) -> list[list[str]]:
    """Parameters distributed over files of at most `largest` bytes, in order; `sizes` are in bytes."""
    groups: list[list[str]] = [[]]
    free = largest
    for name, size in sizes.items():
        if size > free and groups[-1]:
            groups.append([])
            free = largest
        groups[-1].append(name)
        free -= size
    return groups


def paths(path: Path, count: int) -> list[Path]:
    """The paths of an artifact's `count` files: `path` itself, or numbered like the shards of a model."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i:05d}-of-{count:05d}{path.suffix}") for i in range(1, count + 1)]


def write_index(path: Path, writers: Sequence[Writer]) -> None:
    """Rename the files to their final names, then write the index, so that no reader sees an incomplete vector."""
    for writer in writers:
        writer.commit()
    if len(writers) > 1:
        weight_map = {name: writer.path.name for writer in writers for name in writer.entries}
        total = sum(entry.size for writer in writers for entry in writer.entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomically(
            path.with_name(path.name + ".index.json"), json.dumps(index, indent=2, sort_keys=True).encode()
        )


def write_files(
    path: Path,
    groups: Sequence[Sequence[str]],
    shapes: Mapping[str, Sequence[int]],
    metadata: Mapping[str, Any],
    write_parameter: Callable[[Writer, str], str | None],
    known_last: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Write a task vector with one file for each group of parameters; all files appear, or none.

    `shapes` are the parameters' by name. `write_parameter` writes the tensors of one parameter and returns its dtype in
    the model, or None if it is unchanged and nothing was written. `metadata` goes into every file, and so does the
    result of `known_last`, which is called when all parameters are written. Raises OutputError.
    """
    with contextlib.ExitStack() as stack:
        writers, contents = [], []
        for number, (file, names) in enumerate(zip(paths(path, len(groups)), groups, strict=True), 1):
            writer = stack.enter_context(Writer(file, room({name: shapes[name] for name in names}, metadata)))
            parameters: dict[str, list[Any]] = {}
            unchanged = []
            for name in names:
                dtype = write_parameter(writer, name)
                if dtype is None:
                    unchanged.append(name)
                else:
                    parameters[name] = [list(shapes[name]), dtype]
            writers.append(writer)
            contents.append({"parameters": parameters, "unchanged": unchanged, "shard": [number, len(groups)]})
        for writer, content in zip(writers, contents, strict=True):
            writer.finish({**metadata, **content, **known_last()})
        write_index(path, writers)


def require_vector_path(path: Path, count: int) -> None:
    """Refuse a path to which a vector in `count` files can't be written. Raises OutputError."""
    if path.suffix != ".safetensors":
        raise OutputError(
            f"the name of a task vector must end in .safetensors, not {path}",
            f"name a file such as {path.with_suffix('.safetensors')}",
        )
    other = path if count > 1 else path.with_name(path.name + ".index.json")
    if os.path.lexists(other):
        raise OutputError(
            f"{other} exists, and would be read instead of {path.name}", "remove it, or choose another --out"
        )
    require_writable(path)
