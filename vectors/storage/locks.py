"""Locks that are released when the process ends, and temporary files and folders protected by them.

A temporary file or folder is called `.NAME.XXXXXXXX.steer-tmp`, with eight random characters from `mkstemp`: a process
id would not be unique, since two containers on one volume are both process 1. A file is locked itself, a folder by the
file `FOLDER.steer-lock` beside it. A temporary name without a lock was left by a killed process, and is removed by the
next process that writes in the same folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".steer-tmp"
LOCK_SUFFIX = ".steer-lock"
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}" + re.escape(SUFFIX), re.DOTALL)
_LOCK = re.compile(r"(\..+)" + re.escape(LOCK_SUFFIX), re.DOTALL)
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_LONGEST_NAME = 200  # bytes of the output's name that go into a temporary one; file systems allow 255 in all


class Busy(Exception):
    """Another process holds the lock."""


def temporary_file(path: Path) -> tuple[int, Path]:
    """A new, locked, empty file beside `path`, readable by its owner alone: its descriptor and its path.

    The lock lasts until the descriptor is closed. Raises OSError.
    """
    return _locked_temporary(path, SUFFIX)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A context with a new, locked, empty folder beside `path`, removed at the end unless renamed. Raises OSError."""
    handle, lock = _locked_temporary(path, SUFFIX + LOCK_SUFFIX)
    folder = lock.with_name(lock.name.removesuffix(LOCK_SUFFIX))
    try:
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        _release(handle, lock)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """A context in which this process holds the lock of `path`, which need not exist. Raises Busy, OSError."""
    lock = path.with_name(path.name + LOCK_SUFFIX)
    handle = _acquire(lock)
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


def _locked_temporary(path: Path, suffix: str) -> tuple[int, Path]:
    shortened = os.fsdecode(os.fsencode(path.name)[:_LONGEST_NAME])
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{shortened}.", suffix=suffix)
        try:
            # Before it was locked, another process may have removed it as a leftover.
            if _lock(handle) and _is_at(handle, Path(name)):
                return handle, Path(name)
        except BaseException:
            os.close(handle)
            Path(name).unlink(missing_ok=True)
            raise
        os.close(handle)


def _acquire(lock: Path, *, create: bool = True) -> int:
    """The descriptor of a lock file, locked. Raises Busy, OSError."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_CREAT if create else 0)
    until = time.monotonic() + PATIENCE
    while True:
        handle = os.open(lock, flags, 0o600)
        try:
            if not _lock(handle):
                if create and time.monotonic() < until:
                    os.close(handle)
                    time.sleep(0.02)
                    continue
                raise Busy(str(lock))
            if _is_at(handle, lock):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the holder removed it meanwhile: lock a new one


def _release(handle: int, lock: Path) -> None:
    # Removed while still held, so that no new lock of another process is removed.
    with contextlib.suppress(OSError):
        lock.unlink()
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
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)


def _really_locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_temporary(path: Path) -> None:
    mode = os.lstat(path).st_mode
    if stat.S_ISREG(mode):
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if _really_locked(handle) and _is_at(handle, path):
                path.unlink()
        finally:
            os.close(handle)
    elif stat.S_ISDIR(mode):
        lock = path.with_name(path.name + LOCK_SUFFIX)
        handle = _acquire(lock)
        if not _really_locked(handle):  # without locks, the owner may still be running
            os.close(handle)
            return
        try:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            _release(handle, lock)


def _remove_lock(lock: Path, folder: Path) -> None:
    """Remove the lock of a folder that no longer exists."""
    if os.path.lexists(folder):
        return
    handle = _acquire(lock, create=False)
    try:
        if _really_locked(handle) and not os.path.lexists(folder):
            lock.unlink()
    finally:
        os.close(handle)
