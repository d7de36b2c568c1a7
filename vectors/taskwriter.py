"""Writing a task vector piece by piece: its header comes first and is known last, so room is left for it."""

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
from vectors.files import NewFile, cannot_write, canonical_json, check_writable, write_atomically
from vectors.task import KIND, SHARD, checksum
from vectors.weights import Entry, header_bytes


class Writer:
    """One file of a task vector, under a temporary name until `commit`. A context manager: what fails leaves nothing.

    `room` is what is kept free for the header, in bytes; what is left of it is filled with spaces, as may be.
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
        """Start a tensor."""
        self.start, self.state = self.file.tell(), hashlib.sha256()

    def write(self, piece: Any) -> None:
        """Add bytes to the tensor that was begun. Raises OutputError."""
        try:
            self.file.write(piece)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.state.update(piece)

    def end(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Finish the tensor, and name it."""
        size = self.file.tell() - self.start
        self.entries[name] = Entry(self.path, dtype, tuple(int(n) for n in shape), self.start, size)
        self.digests[name] = "sha256:" + self.state.hexdigest()

    def drop(self) -> None:
        """Take back the tensor that was begun."""
        self.file.seek(self.start)
        self.file.truncate()

    def add(self, name: str, dtype: str, array: Any) -> None:
        """A whole tensor at once."""
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
        """Give the file its name."""
        self._new.commit()


def room(parameters: Mapping[str, Sequence[int]], metadata: Mapping[str, Any]) -> int:
    """Enough bytes for the header of a file with these parameters, whatever they turn out to be stored as."""
    names = sum(3 * (len(json.dumps(name)) + 150) + 2 * (len(name) + 80) for name in parameters)
    return (len(canonical_json(metadata)) * 2 + names + 4096) // 4096 * 4096 + 4096


def shards(sizes: Mapping[str, int], largest: int = SHARD) -> list[list[str]]:
    """Parameters cut into files of at most `largest` bytes, in their order."""
    found: list[list[str]] = [[]]
    free = largest
    for name, size in sizes.items():
        if size > free and found[-1]:
            found.append([])
            free = largest
        found[-1].append(name)
        free -= size
    return found


def paths(path: Path, count: int) -> list[Path]:
    """The names of an artifact's files."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i:05d}-of-{count:05d}{path.suffix}") for i in range(1, count + 1)]


def write_index(path: Path, writers: Sequence[Writer]) -> None:
    """Give the files their names, the index last, so that a vector in several files appears whole or not at all."""
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
    """Write a task vector with a file for each group of parameters; all of its files appear, or none.

    `write_parameter` writes the tensors of one parameter, and returns the dtype that it has in the model; None where
    nothing was written, as it is unchanged. `metadata` is what all files say, and `known_last` what they say too once
    every parameter is written. Raises OutputError.
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


def check_vector_path(path: Path, count: int) -> None:
    """Whether an artifact can be written there. Raises OutputError with all problems."""
    if path.suffix != ".safetensors":
        raise OutputError(
            f"{path} is no name for a task vector", f"name a file such as {path.with_suffix('.safetensors')}"
        )
    other = path if count > 1 else path.with_name(path.name + ".index.json")
    if os.path.lexists(other):
        raise OutputError(f"{other} is there, and would be taken for {path.name}", "remove it, or choose another --out")
    check_writable(path)
