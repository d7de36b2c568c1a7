"""Canonical JSON, digests, and files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from vectors.errors import OutputError
from vectors.storage.locks import ended, remove_leftovers, temporary_file, temporary_folder

_CLONE = 0x40049409  # FICLONE of Linux


def canonical_json(value: Any) -> str:
    """The canonical text of a JSON value: sorted keys, no spaces, UTF-8. Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def finite(value: Any) -> Any:
    """`value` with None for NaN and infinity, which JSON can't represent, such as a loss that overflowed."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def readable_json(value: Any) -> bytes:
    """The content of a JSON file that people read too: indented, keys in order, None for what is no finite number."""
    return (json.dumps(finite(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def digest_bytes(*parts: bytes | memoryview) -> str:
    """`sha256:` and the hexadecimal SHA-256 of the parts, one after the other."""
    return digest_pieces(parts)


def digest_pieces(parts: Iterable[bytes | memoryview]) -> str:
    """The digest of parts that are made one after the other, so that they need not fit into memory together."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return "sha256:" + state.hexdigest()


def digest_file(path: Path) -> str:
    """The digest of a file's bytes, read in pieces: a file may be larger than the memory. Raises OSError."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """The digest of a value's canonical JSON."""
    return digest_bytes(canonical_json(value).encode())


def permissions(requested: int = 0o666) -> int:
    """`requested` without the bits of the umask; by default the mode that `open(..., "w")` gives a new file."""
    # The umask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return requested & ~mask


def _link_target(path: Path) -> Path:
    """The file that `path` stands for: a symbolic link is followed, not replaced."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def require_writable(path: Path) -> None:
    """Refuse, before any work, a `path` to which a file can't be written. Raises OutputError.

    An existing file must be an ordinary, writable one; this is checked because a rename would replace anything.
    """
    target = _link_target(path)
    folder = target.parent
    # os.path answers False where pathlib raises: for a name that is too long, or a folder that can't be entered.
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder", "name a file, such as " + str(path / "vector.safetensors"))
    if os.path.islink(target):
        raise OutputError(f"{path} is a link that leads back to itself", "choose another --out")
    if os.path.exists(target):
        mode = os.stat(target).st_mode
        if not stat.S_ISREG(mode):
            raise OutputError(f"{path} is a pipe, socket or device, not an ordinary file", "choose another --out")
        # The mode is checked too, since the superuser can write to every file.
        if not mode & 0o222 or not os.access(target, os.W_OK):
            raise OutputError(f"{path} is read-only", f"allow it: chmod u+w {path}; or choose another --out")
    if not os.path.exists(folder):
        raise OutputError(
            f"the folder {folder} of the output {path.name} does not exist", f"make it first: mkdir -p {folder}"
        )
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)  # a name that is too long fails here
        # Tested by making a file: mode bits do not show read-only mounts and quotas.
        handle, temporary = temporary_file(target)
        os.close(handle)
        temporary.unlink(missing_ok=True)
        ended(temporary)
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror}", "choose another --out") from error


def require_distinct(out: Path, inputs: Mapping[str, object]) -> None:
    """Refuse an output that is one of the inputs, which are given by option or argument. Raises OutputError."""
    for name, source in inputs.items():
        both_exist = isinstance(source, str | Path) and os.path.exists(out) and os.path.exists(source)
        if both_exist and os.path.samefile(out, str(source)):
            raise OutputError(f"the output {out} is the file given as {name}", "name another file to write")


class NewFile:
    """A file that appears under its name only when complete: `file`, to write to, has a temporary name beside it.

    A kill or a full disk at any moment leaves the old file or none, never a part; leftovers of a killed process are
    removed by the next one that writes in the same folder. If `path` is a symbolic link, its target is written. Ends
    with `commit` or `discard`. All methods raise OutputError.
    """

    def __init__(self, path: Path, *, buffering: int = -1, mode: int = 0o666, folder: Path | None = None) -> None:
        self.path, self._target, self._mode = path, _link_target(path), mode
        self._temporary: Path | None = None
        self.file: IO[bytes]
        beside = self._target if folder is None else folder / self._target.name
        remove_leftovers(beside.parent)
        with self._reporting():
            handle, self._temporary = temporary_file(beside)
            try:
                self.file = os.fdopen(handle, "w+b", buffering=buffering)
            except BaseException:
                self._temporary.unlink(missing_ok=True)
                ended(self._temporary)
                raise

    def flush(self) -> None:
        """Flush everything to disk; the file keeps its temporary name."""
        with self._reporting():
            self.file.flush()
            os.fsync(self.file.fileno())

    def commit(self) -> None:
        """Flush the file, rename it to its final name and close it."""
        if self._temporary is None:
            return
        self.flush()
        with self._reporting():
            os.chmod(self._temporary, permissions(0o666 & self._mode))
            os.replace(self._temporary, self._target)
            ended(self._temporary)
            self._temporary = None
            self.file.close()

    def discard(self) -> None:
        """Close the file, and remove it if it was not committed."""
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            ended(self._temporary)
            self._temporary = None
        # Errors of writing what is still buffered do not matter.
        with contextlib.suppress(OSError):
            self.file.close()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self.path, error) from error


@contextlib.contextmanager
def new_file(path: Path, *, buffering: int = -1, mode: int = 0o666, folder: Path | None = None) -> Iterator[IO[bytes]]:
    """A context with a binary file to write to, which is renamed to `path` at its end, or removed after an error.

    `buffering` is that of `open`; the file gets the permissions of `mode`, at most 0o666, less the umask. The temporary
    file lies beside `path`, or in `folder` of the same file system: that of `path` is listed for leftovers, which takes
    long where it holds very many files. Raises OutputError, also for errors while writing to the file.
    """
    new = NewFile(path, buffering=buffering, mode=mode, folder=folder)
    try:
        with new._reporting():
            yield new.file
        new.commit()
    finally:
        new.discard()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file at once; it appears complete or not at all (see `NewFile`). Raises OutputError."""
    with new_file(path) as file:
        file.write(content)


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file of lines and flush it to disk; a last line that a kill cut off is removed first.

    Only one process may append at a time. Raises OutputError.
    """
    append_lines(path, [line])


def append_lines(path: Path, lines: Iterable[bytes]) -> None:
    """As `append_line`, several at once: a kill leaves the first of them, whole."""
    lines = list(lines)
    if any(b"\n" in line for line in lines):
        raise ValueError("a line holds no line break")
    try:
        with open(path, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**20))
            tail = file.read()
            file.truncate(size - (len(tail) - tail.rfind(b"\n") - 1))
            file.write(b"".join(line + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def copy_content(source: IO[bytes], target: IO[bytes]) -> None:
    """Copy a file's content to a new file, sharing its blocks where btrfs or xfs can. Raises OSError."""
    try:
        fcntl.ioctl(target.fileno(), _CLONE, source.fileno())
    except OSError:
        shutil.copyfileobj(source, target, 1024**2)
    target.flush()


def linked_copy(source: Path, target: Path, *, copied_below: int = 0) -> None:
    """Make `target` a file with the content of `source`, which must never be changed in place.

    Blocks are shared where the file system can, else the file itself (a hard link, with the permissions of `source`).
    A copy, which may be written to, is made of files smaller than `copied_below` bytes, and from one file system to
    another. Raises OutputError.
    """
    try:
        with temporary_folder(target) as folder, source.open("rb") as old:
            made = folder / "content"
            try:
                with made.open("wb") as new:
                    fcntl.ioctl(new.fileno(), _CLONE, old.fileno())
            except OSError:
                made.unlink()
                try:
                    if os.fstat(old.fileno()).st_size < copied_below:
                        raise OSError
                    os.link(source, made)
                except OSError:
                    with made.open("wb") as new:
                        copy_content(old, new)
                        os.fsync(new.fileno())
            os.replace(made, target)
    except OSError as error:
        raise cannot_write(target, error) from error


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The OutputError for an OSError of writing `path`, with a hint that fits it."""
    hint = "free some space, or choose another --out" if error.errno in FULL else "choose another --out"
    return OutputError(f"{path} can't be written: {error.strerror or error}", hint, path=path)
