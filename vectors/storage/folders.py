"""Output folders that appear complete or not at all, and work folders of runs that can be interrupted and resumed.

Both are made beside the output, on the same file system, so that one rename publishes them. Both are locked by the
process that writes to them (`vectors.storage.locks`).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vectors.documents import json_text
from vectors.errors import OutputError, UsageError
from vectors.storage.files import FULL, cannot_write, canonical_json, digest_json, permissions, write_atomically
from vectors.storage.locks import Busy, locked, remove_leftovers, shortened, temporary_folder

IDENTITY = "run.json"
RESERVE = 64 << 20  # bytes of disk space that are never used


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
        disk = shutil.disk_usage(parent)
        if disk.total == 0 or not os.access(parent, os.W_OK):  # /proc and the like hold no files of anyone
            problems.append(f"{parent} can't be written")
            hints.append("choose another --out")
        elif disk.free + have < needed + RESERVE:
            room = (
                f"{parent} has {(disk.free + have) / 1e9:.2f} GB free, of which {RESERVE / 1e9:.2f} GB are never used"
            )
            problems.append(f"the output takes {needed / 1e9:.2f} GB, and {room}")
            hints.append("free some space, or choose another --out")
    if problems:
        raise OutputError(problems, "; ".join(hints))


@contextlib.contextmanager
def new_folder(out: Path, needed: int = 0) -> Iterator[Path]:
    """A context with an empty folder beside `out`, which is renamed to `out` at its end, or removed after an error.

    Raises OutputError before anything is made when `out` exists, can't be made, or the disk lacks `needed` bytes.
    """
    require_free_output(out, needed)
    with _reporting(out, resumable=False), temporary_folder(out.absolute()) as folder:
        yield folder
        folder.chmod(permissions(0o777))
        publish(folder, out)


def hidden_name(out: Path, ending: str) -> str:
    """The name of a folder beside `out` that belongs to it, such as `.OUT.work`; of a long name only a part."""
    return f".{shortened(out.name)}.{ending}"


def keep_always(_folder: Path, _error: BaseException) -> bool:
    """The default of `keep`: work can be resumed after any error."""
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
    """A context with the locked work folder of a run that writes `out`; it holds what an interrupted run left.

    `identity` is everything that determines the result, as JSON values; work of another identity is refused. It is
    None for a folder that is identified by its `name`, which is `.OUT.work` by default. At a clean end the folder is
    removed, or with `becomes_output` renamed to `out`. After an error it stays if `keep(folder, error)`. Raises
    UsageError for the work of another run, OutputError.
    """
    folder = out.absolute().with_name(name or hidden_name(out, "work"))
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
    """Whether `folder` holds the work of an interrupted run."""
    return (folder / IDENTITY).is_file()


def require_same_work(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to resume the work of another run. Raises UsageError that names what differs."""
    if not has_work(folder):
        return
    try:
        before = json_text.parse(json_text.read_bounded(folder / IDENTITY, json_text.LARGEST))
    except (OSError, ValueError):
        before = {}
    before = before if isinstance(before, dict) else {}
    if digest_json(before) == digest_json(dict(identity)):
        return
    changed = sorted(key for key in {*before, *identity} if before.get(key) != identity.get(key))
    raise UsageError(
        f"{folder} holds checkpoints of another run, which differs in {', '.join(changed)}",
        f"resume it with the command of that run, or remove it: rm -r {folder}",
    )


def remove_unfinished(out: Path, pattern: str) -> None:
    """Remove the work folders `.OUT.<pattern>` beside `out` that no process has locked.

    `pattern` is a regular expression for everything after the output's name, so that the folders of an output `m.v2`
    are never taken for those of `m`.
    """
    name = re.compile(re.escape(hidden_name(out, "")) + pattern)
    parent = out.absolute().parent
    for entry in list(os.scandir(parent)):
        if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(Busy, OSError), locked(parent / entry.name):
                shutil.rmtree(parent / entry.name)


def publish(folder: Path, out: Path) -> None:
    """Flush a finished folder to disk and rename it to `out`. Raises OutputError if `out` exists by now."""
    flush(folder)
    _require_free_name(out)
    os.rename(folder, out)
    flush(out.absolute().parent)


def _require_free_name(out: Path) -> None:
    if os.path.lexists(out):
        raise OutputError(f"the output {out} exists now", "choose another --out")


def flush(folder: Path) -> None:
    """Flush the entries of a folder (not the contents of its files) to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _enter(folder: Path) -> None:
    """Make the work folder, or check that the existing one can be used. Raises OutputError."""
    try:
        folder.mkdir(mode=permissions(0o777))
        return
    except FileExistsError:
        status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or not os.access(folder, os.W_OK):
        raise OutputError(f"{folder} is not a folder that this user can write to", "remove it, or choose another --out")
    for entry in os.scandir(folder):
        if entry.is_symlink():  # not made by us: writing to it would write elsewhere
            os.unlink(entry.path)


@contextlib.contextmanager
def _alone(folder: Path, out: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except Busy as busy:
            if busy.doubt:
                problem = f"another process may be writing {out}: there is the lock {busy.lock.name}, and {busy.doubt}"
                raise OutputError(problem, f"if nothing writes there any more: rm {busy.lock}") from None
            raise OutputError(f"another process is writing {out}", "wait until it has finished") from None
        yield


@contextlib.contextmanager
def _reporting(out: Path, *, resumable: bool) -> Iterator[None]:
    """A context in which an OSError becomes an OutputError that names the output, not a temporary file.

    Errors of files that are not part of the output keep their names.
    """
    try:
        yield
    except (OSError, OutputError) as caught:
        error = caught.__cause__ if isinstance(caught, OutputError) else caught
        if not isinstance(error, OSError):
            raise
        failed = caught.path if isinstance(caught, OutputError) else error.filename
        if isinstance(failed, str | bytes | Path) and not _is_part(Path(os.fsdecode(failed)), out):
            if isinstance(caught, OutputError):
                raise
            problem = f"{os.fsdecode(failed)} can't be used: {error.strerror or error}"
            raise OutputError(problem, f"mend it, and run the command again: {out} is not written yet") from error
        if resumable and error.errno in FULL:
            hint = "free some space and run the command again: it resumes where it stopped"
            raise OutputError(f"{out} can't be written: {error.strerror or error}", hint) from error
        raise cannot_write(out, error) from error


def _is_part(path: Path, out: Path) -> bool:
    """Whether a path is the output, in one of its folders with other names, or the folder that holds them."""
    parent = out.absolute().parent
    if path.absolute() == parent:
        return True
    parts = path.absolute().parts[len(parent.parts) :] if path.absolute().is_relative_to(parent) else ()
    return bool(parts) and (parts[0] == out.name or parts[0].startswith(hidden_name(out, "")))
