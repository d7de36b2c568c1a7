"""Locks that are released when the process ends, and temporary files and folders protected by them.

A temporary file or folder is called `.NAME.XXXXXXXX.MMMMMMMM.steer-tmp`, with eight random characters from `mkstemp`
(a process id would not be unique, since two containers on one volume are both process 1) and eight for the machine. A
file is locked itself, a folder by the file `FOLDER.steer-lock` beside it. A temporary name without a lock was left by a
killed process, and is removed by the next process that writes in the same folder; one of another machine, whose locks
may not be seen here, only after `machines.DAYS`. Where a file system has no locks at all, everything counts as locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from vectors.storage import machines

SUFFIX = ".steer-tmp"
LOCK_SUFFIX = ".steer-lock"
_TEMPORARY = re.compile(r"\..+?\.[a-z0-9_]{8}(?:\.(?P<machine>[0-9a-f]{8}))?" + re.escape(SUFFIX), re.DOTALL)
_LOCK = re.compile(r"(\..+)" + re.escape(LOCK_SUFFIX), re.DOTALL)
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_LONGEST_NAME = 200  # bytes of the output's name that go into another one; file systems allow 255 in all


class Busy(Exception):
    """Another process holds the lock, or may hold it: `doubt` says why that is not known. `lock` is its file."""

    def __init__(self, lock: Path, doubt: str = "") -> None:
        super().__init__(str(lock))
        self.lock, self.doubt = lock, doubt


def shortened(name: str) -> str:
    """A file name as a part of another one: a long one is cut, and ends in a digest of the whole."""
    content = os.fsencode(name)
    if len(content) <= _LONGEST_NAME:
        return name
    return f"{os.fsdecode(content[:160])}-{hashlib.sha256(content).hexdigest()[:16]}"


_MADE: dict[Path, int] = {}  # by this process, and not ended yet: temporary files and locks, and their descriptors


def temporary_file(path: Path) -> tuple[int, Path]:
    """A new, locked, empty file beside `path`, readable by its owner alone: its descriptor and its path.

    The lock lasts until the descriptor is closed. Call `ended` when the file has been renamed or removed. Raises
    OSError.
    """
    return _locked_temporary(path, SUFFIX)


def ended(temporary: Path) -> None:
    """Forget a temporary file that has been renamed or removed."""
    _MADE.pop(temporary, None)


def remove_unfinished_of_this_process() -> None:
    """Remove the temporary files, folders and locks of this process, of a command that has ended.

    Contexts remove their own; but a signal may come when a file is made and its context not entered yet.
    """
    for path, handle in list(_MADE.items()):
        folder = path.with_name(path.name.removesuffix(LOCK_SUFFIX))
        if folder != path and _TEMPORARY.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            if _really_locked(handle) and _is_at(handle, path):
                path.unlink()
        ended(path)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """A context at whose end SIGINT and SIGTERM take effect: by then, what it makes is in `_MADE`, or is gone."""
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread alone
        yield
        return
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    callable_ones = {number: handler for number, handler in before.items() if callable(handler)}
    try:
        for number in callable_ones:
            signal.signal(number, lambda sent, _frame: received.append(sent))
        yield
    finally:
        for number, handler in callable_ones.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A context with a new, locked, empty folder beside `path`, removed at the end unless renamed. Raises OSError."""
    with temporary_folder_and_lock(path) as (folder, _):
        yield folder


@contextlib.contextmanager
def temporary_folder_and_lock(path: Path) -> Iterator[tuple[Path, int]]:
    """As `temporary_folder`, with the descriptor of the lock: a child that inherits it holds the lock too."""
    handle, lock = _locked_temporary(path, SUFFIX + LOCK_SUFFIX)
    folder = lock.with_name(lock.name.removesuffix(LOCK_SUFFIX))
    try:
        folder.mkdir(mode=0o700)
        yield folder, handle
    finally:
        with _signals_wait():  # a removal that is interrupted would leave the rest, and no lock that says so
            shutil.rmtree(folder, ignore_errors=True)
            _release(handle, lock)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """A context in which this process holds the lock of `path`, which need not exist. Raises Busy, OSError."""
    lock = _lock_of(path)
    handle = _acquire(lock, patience=PATIENCE)
    try:
        yield
    finally:
        _release(handle, lock)


PATIENCE = 0.5  # seconds to wait for a lock, since `remove_leftovers` of another process holds it for a moment


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders in `folder` whose process has died. Links are never followed.

    What can't be removed stays without an error: it belongs to another user, or another process is removing it.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.endswith((SUFFIX, LOCK_SUFFIX))]
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError, Busy):
            if _TEMPORARY.fullmatch(name):
                _remove_temporary(folder / name)
            elif match := _LOCK.fullmatch(name):
                _remove_lock(folder / name, folder / match[1])


def _lock_of(path: Path) -> Path:
    return path.with_name(shortened(path.name) + LOCK_SUFFIX)


def _locked_temporary(path: Path, suffix: str) -> tuple[int, Path]:
    suffix = f".{machines.tag()}{suffix}"
    while True:
        with _signals_wait():
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{shortened(path.name)}.", suffix=suffix)
            _MADE[Path(name)] = handle
        try:
            # Before it was locked, another process may have removed it as a leftover.
            if _lock(handle) and _is_at(handle, Path(name)):
                return handle, Path(name)
        except BaseException:
            os.close(handle)
            Path(name).unlink(missing_ok=True)
            ended(Path(name))
            raise
        os.close(handle)
        ended(Path(name))


def _acquire(lock: Path, *, create: bool = True, patience: float = 0) -> int:
    """The descriptor of a lock file, locked within `patience` seconds. Raises Busy, OSError."""
    until = time.monotonic() + patience
    while True:
        with _signals_wait():
            opened = _open(lock, create)
            if opened and opened[1]:
                _MADE[lock] = opened[0]
        if opened is None:
            continue
        handle, new = opened
        try:
            if not _lock(handle):
                if time.monotonic() < until:
                    if new:
                        ended(lock)
                    os.close(handle)
                    time.sleep(0.02)
                    continue
                raise Busy(lock)
            if not new and not _really_locked(handle):
                raise Busy(lock, "its file system has no locks")
            if _is_at(handle, lock):
                _require_own_machine(handle, lock)
                if create:
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"{machines.tag()} {machines.name()}\n".encode(), 0)
                    _MADE[lock] = handle
                return handle
        except (Busy, OSError):
            if new:
                ended(lock)
            os.close(handle)
            raise
        if new:
            ended(lock)
        os.close(handle)  # the holder removed it meanwhile: lock a new one


def _open(lock: Path, create: bool) -> tuple[int, bool] | None:
    """A lock file, and whether it is new; None if it vanished meanwhile."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    if create:
        with contextlib.suppress(FileExistsError):
            return os.open(lock, flags | os.O_CREAT | os.O_EXCL, 0o600), True
    try:
        return os.open(lock, flags), False
    except FileNotFoundError:
        if create:
            return None
        raise


def _require_own_machine(handle: int, lock: Path) -> None:
    """Refuse a lock file that another machine has left, unless locks are seen by all machines. Raises Busy."""
    made_by, _, name = os.pread(handle, 100, 0).decode(errors="replace").strip().partition(" ")
    if made_by and _is_foreign(made_by, lock, os.fstat(handle).st_mtime):
        raise Busy(lock, f"it is of the machine {name}, whose locks may not be seen here")


def _is_foreign(made_by: str | None, path: Path, modified: float) -> bool:
    """Whether another machine has made `path` and may still be writing to it."""
    if made_by in (None, machines.tag()) or machines.shows_locks(path.parent):
        return False
    return time.time() - modified < machines.DAYS * 86400


def _release(handle: int, lock: Path) -> None:
    # Removed while still held, so that no new lock of another process is removed.
    with contextlib.suppress(OSError):
        lock.unlink()
    ended(lock)
    os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file without waiting; False if another process holds it. True on file systems without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            return False
        if error.errno not in _UNSUPPORTED:
            raise
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), status)


def _really_locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_temporary(path: Path) -> None:
    status, match = os.lstat(path), _TEMPORARY.fullmatch(path.name)
    if match and _is_foreign(match["machine"], path, status.st_mtime):
        return
    if stat.S_ISREG(status.st_mode):
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if _really_locked(handle) and _is_at(handle, path):
                path.unlink()
        finally:
            os.close(handle)
    elif stat.S_ISDIR(status.st_mode):
        lock = path.with_name(path.name + LOCK_SUFFIX)
        handle = _acquire(lock)
        try:
            if not _really_locked(handle):  # without locks, the owner may still be running
                return
            shutil.rmtree(path, ignore_errors=True)
        finally:
            _release(handle, lock)


def _remove_lock(lock: Path, folder: Path) -> None:
    """Remove the lock of a folder that no longer exists."""
    match = _TEMPORARY.fullmatch(folder.name)
    if os.path.lexists(folder) or (match and _is_foreign(match["machine"], lock, os.lstat(lock).st_mtime)):
        return
    handle = _acquire(lock, create=False)
    try:
        if _really_locked(handle) and not os.path.lexists(folder):
            lock.unlink()
    finally:
        os.close(handle)
