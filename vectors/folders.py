"""Folders that appear whole or not at all, and the folders of work that can be interrupted and resumed.

Both lie beside the output, on the same file system, so that a rename gives them their name at once. Both are locked by
the process that fills them (`vectors.locks`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vectors.errors import OutputError, UsageError
from vectors.files import FULL, cannot_write, canonical_json, digest_json, permissions, write_atomically
from vectors.locks import Busy, locked, remove_leftovers, temporary_folder

IDENTITY = "run.json"
RESERVE = 64 << 20  # bytes that stay free on the disk


def require_free_output(out: Path, needed: int = 0, *, have: int = 0) -> None:
    """Refuse an output folder that exists or can't be made, or a disk without room. Raises OutputError.

    `needed` bytes will be written, of which `have` are on the disk already. All problems are reported together.
    """
    problems, hints = [], []
    parent = out.absolute().parent
    if os.path.lexists(out):
        problems.append(f"the output {out} exists")
        hints.append("choose another --out, or remove it")
    if not os.path.isdir(parent):
        problems.append(f"the folder {parent} of the output {out.name} does not exist")
        hints.append(f"mkdir -p {parent}")
    else:
        remove_leftovers(parent)  # first, since they may be what fills the disk
        free = shutil.disk_usage(parent).free + have
        if free < needed + RESERVE:
            problems.append(f"the output takes {needed / 1e9:.2f} GB, and {parent} has {free / 1e9:.2f} GB free")
            hints.append("free some space, or choose another --out")
        if not os.access(parent, os.W_OK):
            problems.append(f"{parent} can't be written")
            hints.append("choose another --out")
    if problems:
        raise OutputError(problems, "; ".join(hints))


@contextlib.contextmanager
def new_folder(out: Path, needed: int = 0) -> Iterator[Path]:
    """Within: an empty folder beside `out`, which takes its name at the end, and is gone if anything fails.

    Raises OutputError before anything is made when `out` exists, can't be made, or the disk lacks `needed` bytes.
    """
    require_free_output(out, needed)
    with _reporting(out, resumable=False), temporary_folder(out.absolute()) as folder:
        yield folder
        folder.chmod(permissions(0o777))
        publish(folder, out)


def keep_always(_folder: Path, _error: BaseException) -> bool:
    """Work that failed in any way can be gone on with."""
    return True


@contextlib.contextmanager
def work_folder(
    out: Path,
    identity: Mapping[str, Any] | None,
    *,
    name: str | None = None,
    keep: Callable[[Path, BaseException], bool] = keep_always,
    becomes_output: bool = False,
) -> Iterator[Path]:
    """Within: the locked folder of one run's work for `out`; what an earlier try of the same run left is in it.

    `identity` is everything that the result follows from, as JSON values; work of another identity is refused; None
    for a folder whose `name` says it. `name` is that of the folder, `.OUT.work` by default. At a clean end the
    folder is removed, or with `becomes_output` takes the name of `out`. After an error it stays if `keep(folder,
    error)`. Raises UsageError for the work of another run, OutputError.
    """
    folder = out.absolute().with_name(name or f".{out.name}.work")
    with _reporting(out, resumable=True), _alone(folder, out):
        remove_leftovers(folder.parent)
        if becomes_output:
            _require_free_name(out)  # under the lock: another process may just have finished
        _enter(folder)
        if identity is not None:
            require_same_work(folder, identity)
            write_atomically(folder / IDENTITY, canonical_json(dict(identity)).encode())
        try:
            yield folder
            if becomes_output:
                publish(folder, out)
        except BaseException as error:
            if folder.is_dir() and not keep(folder, error):
                shutil.rmtree(folder)
            raise
        if not becomes_output:
            shutil.rmtree(folder)


def has_work(folder: Path) -> bool:
    """Whether an interrupted run left its work in `folder`."""
    return (folder / IDENTITY).is_file()


def require_same_work(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to go on with the work of another run. Raises UsageError, which names what differs."""
    if not has_work(folder):
        return
    try:
        before = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        before = {}
    before = before if isinstance(before, dict) else {}
    if digest_json(before) == digest_json(dict(identity)):
        return
    changed = sorted(key for key in {*before, *identity} if before.get(key) != identity.get(key))
    raise UsageError(
        f"{folder} holds checkpoints of another run, which differs in {', '.join(changed)}",
        f"go on with that run's own command, or remove it: rm -r {folder}",
    )


def remove_unfinished(out: Path, pattern: str) -> None:
    """Remove the work folders `.OUT.<pattern>` beside `out`, unless a process works in them.

    `pattern` is a regular expression for everything behind the output's name, so that `m` never takes what belongs to
    an output called `m.v2`.
    """
    name = re.compile(re.escape(f".{out.name}.") + pattern)
    parent = out.absolute().parent
    for entry in list(os.scandir(parent)):
        if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(Busy, OSError), locked(parent / entry.name):
                shutil.rmtree(parent / entry.name)


def publish(folder: Path, out: Path) -> None:
    """Give a finished folder its name, and flush it to disk. Raises OutputError if something has that name by now."""
    flush(folder)
    _require_free_name(out)
    os.rename(folder, out)
    flush(out.absolute().parent)


def _require_free_name(out: Path) -> None:
    if os.path.lexists(out):
        raise OutputError(f"the output {out} exists now", "choose another --out")


def flush(folder: Path) -> None:
    """Flush a folder's own entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _enter(folder: Path) -> None:
    """Make the work folder, or go into the one that is there, if it is a folder of ours. Raises OutputError."""
    try:
        folder.mkdir(mode=permissions(0o777))
        return
    except FileExistsError:
        status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or not os.access(folder, os.W_OK):
        raise OutputError(f"{folder} is no folder that this user can write", "remove it, or choose another --out")
    for entry in os.scandir(folder):
        if entry.is_symlink():  # none of ours: writing to that name would write elsewhere
            os.unlink(entry.path)


@contextlib.contextmanager
def _alone(folder: Path, out: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except Busy:
            raise OutputError(f"another process is making {out}", "wait for it") from None
        yield


@contextlib.contextmanager
def _reporting(out: Path, *, resumable: bool) -> Iterator[None]:
    """Within: an error of the operating system becomes an OutputError, which names the output, not a temporary name."""
    try:
        yield
    except (OSError, OutputError) as caught:
        error = caught.__cause__ if isinstance(caught, OutputError) else caught
        if not isinstance(error, OSError):
            raise
        if resumable and error.errno in FULL:
            hint = "free some space and run it again: it goes on where it was"
            raise OutputError(f"{out} can't be written: {error.strerror or error}", hint) from error
        raise cannot_write(out, error) from error
