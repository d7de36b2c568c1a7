"""The work folder of a bake, beside its output: what was prepared, and checkpoints, so that a killed run goes on.

It is bound to everything that the result follows from; another run's is refused, never mixed in.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vectors.errors import OutputError, SteerError, UsageError
from vectors.files import canonical_json, digest_json, permissions, write_atomically

RUN = "run.json"


def place(out: Path) -> Path:
    """Where the work for an output happens."""
    return out.absolute().parent / f".{out.name}.bake"


def check(out: Path, run: Mapping[str, Any]) -> bool:
    """Whether there is work of this very run to go on with. Raises UsageError for that of another one."""
    file = place(out) / RUN
    if not file.is_file():
        return False
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    if digest_json(before) == digest_json(dict(run)):
        return True
    changed = sorted(key for key in {*before, *run} if before.get(key) != run.get(key))
    raise UsageError(
        f"{place(out)} holds checkpoints of another run, which differs in {', '.join(changed)}",
        f"go on with that run's own command, or remove it: rm -r {place(out)}",
    )


@contextlib.contextmanager
def working(out: Path, run: Mapping[str, Any]) -> Iterator[Path]:
    """Within: the run's folder; it is removed at the end, and kept when anything fails that could go on from it.

    A refusal before the first checkpoint leaves nothing, so that a better command is not refused for it. Raises
    OutputError.
    """
    folder = place(out)
    try:
        folder.mkdir(exist_ok=True, mode=permissions(0o777))
        with FileLock(folder / ".lock", timeout=0):
            write_atomically(folder / RUN, canonical_json(dict(run)).encode())
            try:
                yield folder
            except SteerError:
                if next(folder.rglob("checkpoint-*"), None) is None:
                    shutil.rmtree(folder)
                raise
        shutil.rmtree(folder)
    except Timeout:
        raise OutputError(f"another process is baking {out}", "wait for it") from None
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        hint = "free some space and run it again: it goes on" if error.errno == 28 else "choose another --out"
        raise OutputError(f"{folder} can't be written: {error.strerror or error}", hint) from error
