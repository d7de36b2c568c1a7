"""Files of a folder that may be links: which of them belong to the folder, and reading only those.

A folder that somebody else made may hold `notes.txt -> /home/me/.ssh/id_rsa`. Copied, the target would be published
with the output. A file belongs to its folder if the path that it stands for, with every link followed, lies in it. The
snapshots of the hub's cache are understood: their files are links to `blobs/` of the same repository.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vectors.errors import ModelError

LEAVES = "a link that leaves the folder"
DANGLING = "a link to nothing"
LOOP = "a link that leads back to itself"
FOLDER_LINK = "a link to a folder"
SPECIAL = "a pipe, socket or device"


def fault_of(folder: Path, path: Path) -> str | None:
    """Why `path` (in `folder`) can't be read as a file of the folder, as a phrase; None if it can.

    Nothing is opened that could block: a pipe or a device is recognised from its status.
    """
    try:
        if os.path.islink(path):
            os.stat(path)  # a loop, or a link to nothing
        real = os.path.realpath(path)
        status = os.lstat(real)
    except OSError as error:
        return _reason(error, path)
    if not _belongs(folder, real):
        return LEAVES
    if stat.S_ISDIR(status.st_mode):
        return FOLDER_LINK if os.path.islink(path) else "a folder"
    if not stat.S_ISREG(status.st_mode):
        return SPECIAL
    return None if os.access(real, os.R_OK) else "not readable"


@contextlib.contextmanager
def opened(folder: Path, path: Path) -> Iterator[IO[bytes]]:
    """A context with a file of `folder`, open for reading. Raises ModelError for what `fault_of` names, and OSError.

    The path is resolved and checked again here, since a link may have been changed after an earlier check.
    """
    fault = fault_of(folder, path)
    if fault is not None:
        raise ModelError(f"{path} can't be read: it is {fault}", "replace it by a copy of the file that is meant")
    # O_NONBLOCK: a pipe that took the file's place would block.
    handle = os.open(os.path.realpath(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ModelError(f"{path} can't be read: it is {SPECIAL}", "run it again when nothing changes the folder")
        yield file


def _reason(error: OSError, path: Path) -> str:
    if error.errno == errno.ELOOP:
        return LOOP
    if isinstance(error, FileNotFoundError):
        return DANGLING if os.path.islink(path) else "missing"
    return "not readable" if isinstance(error, PermissionError) else str(error.strerror or error).lower()


def _belongs(folder: Path, real: str) -> bool:
    root = os.path.realpath(folder)
    if os.path.commonpath([root, real]) == root:
        return True
    blobs = _blobs(root)
    return blobs is not None and os.path.dirname(real) == blobs


def _blobs(root: str) -> str | None:
    """The folder to which a snapshot `models--ORG--NAME/snapshots/COMMIT` of the hub's cache links its files."""
    for parent in (Path(root), *Path(root).parents):
        repository = parent.parent.parent
        if parent.parent.name == "snapshots" and repository.name.startswith("models--"):
            return str(repository / "blobs")
    return None
