"""Rows on their way to the database, in files that outlive the process.

A row is appended before the answer that it describes is whole, with one write to a local file: a killed server has lost
nothing that a client has received, and while the database is away the files hold what waits for it. What has reached
the database is cut off. Each process writes files of its own, under a lock; files without a lock were left by a killed
server, and whoever opens the log next takes their rows into the database.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Row = tuple[str, Mapping[str, Any]]  # the name of a table, and a row of it

LARGEST = 1 << 30  # bytes of all files of a process
SEGMENT = 16 << 20  # bytes of a file, behind which the next one begins
SUFFIX = ".jsonl"
_ENCODE = json.JSONEncoder(separators=(",", ":")).encode


def journal_of(file: Path, name: str) -> Path:
    """The folder in which the rows of an experiment wait for its log: NAME.journal beside its file."""
    return file.absolute().parent / f"{name}.journal"


class _Segment(NamedTuple):
    path: Path
    handle: int


class Journal:
    """The journal of one process in a folder. `append` and `read` may be called by different threads."""

    def __init__(self, folder: Path, *, largest: int = LARGEST, segment: int = SEGMENT) -> None:
        self.folder, self.largest, self.segment = folder, largest, segment
        self.lock = threading.Lock()
        self.segments: list[_Segment] = []
        self.size = 0  # of the last segment: bytes of whole rows
        self.full = 0  # bytes of the segments before it
        self.position = 0  # up to which the first segment is in the database
        self.rows = 0  # that are not in the database yet

    def append(self, row: Row) -> bool:
        """Append a row, cleaned; False where it can't be written, as on a full disk. Never raises, and never waits for
        a disk to be flushed."""
        text = _ENCODE(row)
        if "\\u0000" in text or "\\ud" in text:  # in escapes: a null byte, or half a character
            text = _ENCODE((row[0], cleaned(row[1])))
        line = text.encode() + b"\n"
        with self.lock:
            if self.full + self.size + len(line) > self.largest:
                return False
            try:
                if not self.segments or self.size > self.segment:
                    self._begin()
                handle = self.segments[-1].handle
                if os.write(handle, line) == len(line):
                    self.size += len(line)
                    self.rows += 1
                    return True
                os.ftruncate(handle, self.size)  # the disk was full in the middle of the row
            except OSError:
                with contextlib.suppress(OSError, IndexError):
                    os.ftruncate(self.segments[-1].handle, self.size)
            return False

    def read(self, most: int) -> tuple[list[Row], int]:
        """Up to `most` rows that are not in the database yet, and their number of bytes for `done`. Raises OSError."""
        with self.lock:
            self._drop_read()
            if not self.segments:
                return [], 0
            handle, start = self.segments[0].handle, self.position
            end = self.size if len(self.segments) == 1 else os.fstat(handle).st_size
        content = os.pread(handle, min(end - start, max(most, 1) * 4096), start)
        while (cut := content.rfind(b"\n") + 1) == 0 and start + len(content) < end:  # one row that is very long
            content += os.pread(handle, 1 << 20, start + len(content))
        lines = content[:cut].splitlines(keepends=True)[:most]
        return [json.loads(line) for line in lines], sum(map(len, lines))

    def done(self, rows: int, size: int) -> None:
        """These first rows are in the database: cut them off. Never raises."""
        with self.lock:
            self.position += size
            self.rows -= rows
            self._drop_read()
            if self.position >= self.size and len(self.segments) == 1:
                with contextlib.suppress(OSError):
                    os.ftruncate(self.segments[0].handle, 0)
                    self.position = self.size = 0

    def close(self) -> None:
        """Close the files; those that hold no rows are removed, others stay for the next that opens the log."""
        with self.lock:
            for segment in self.segments:
                if self.rows:
                    os.close(segment.handle)
                else:
                    self._end(segment)
            self.segments = []

    def _begin(self) -> None:
        """Begin a new file. Raises OSError."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
        handle = _locked(path)
        self.full += self.size
        self.segments.append(_Segment(path, handle))
        self.size = 0

    def _drop_read(self) -> None:
        """Remove the first file where all its rows are in the database and another has begun."""
        while len(self.segments) > 1 and self.position >= (length := os.fstat(self.segments[0].handle).st_size):
            self._end(self.segments.pop(0))
            self.full, self.position = self.full - length, 0

    def _end(self, segment: _Segment) -> None:
        segment.path.unlink(missing_ok=True)
        os.close(segment.handle)


def _locked(path: Path) -> int:
    """The descriptor of a new file, under its lock. Raises OSError.

    It gets its name once it is locked: whoever opens the log in between would take it for one that was left.
    """
    unnamed = path.with_suffix(".new")
    handle = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(path)
    except BaseException:
        os.close(handle)
        unnamed.unlink(missing_ok=True)
        raise
    return handle


@contextlib.contextmanager
def _abandoned(path: Path) -> Iterator[int | None]:
    """A context with the descriptor of a file that no process holds; None where one does, or where it has gone."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle if os.fstat(handle).st_nlink else None
    except BlockingIOError:
        yield None
    finally:
        os.close(handle)


def abandoned(folder: Path) -> Iterator[tuple[list[Row], int]]:
    """The rows of each file that a killed server has left, and how many lines are damaged.

    A file is removed when the next one is asked for, by when its rows must be in the database.
    """
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        with _abandoned(path) as handle:
            if handle is None:
                continue
            rows: list[Row] = []
            damaged = 0
            with os.fdopen(os.dup(handle), "rb") as file:
                for line in file:
                    try:
                        table, row = json.loads(line)
                        rows.append((str(table), dict(row)))
                    except (ValueError, TypeError):  # the end of a row that a lost machine did not write
                        damaged += 1
            yield rows, damaged
            path.unlink(missing_ok=True)


def cleaned(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose texts every database takes: no null bytes (PostgreSQL), no halves of characters."""
    return {key: _cleaned(value) if isinstance(value, str) else value for key, value in row.items()}


def _cleaned(text: str) -> str:
    if "\0" in text:
        text = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
