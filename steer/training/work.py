"""The work folder of a bake, beside its output: what was prepared, and checkpoints, so that a killed run goes on.

It is bound to everything that the result follows from; another run's is refused, never mixed in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vectors.errors import SteerError
from vectors.folders import has_work, require_same_work, work_folder


def place(out: Path) -> Path:
    """Where the work for an output happens."""
    return out.absolute().parent / f".{out.name}.bake"


def check(out: Path, run: Mapping[str, Any]) -> bool:
    """Whether there is work of this very run to go on with. Raises UsageError for that of another one."""
    require_same_work(place(out), run)
    return has_work(place(out))


@contextlib.contextmanager
def working(out: Path, run: Mapping[str, Any]) -> Iterator[Path]:
    """Within: the run's folder; it is removed at the end, and kept when anything fails that could go on from it.

    A refusal before the first checkpoint leaves nothing, so that a better command is not refused for it. Raises
    OutputError.
    """
    with work_folder(out, run, name=place(out).name, keep=_worth_keeping) as folder:
        yield folder


def _worth_keeping(folder: Path, error: BaseException) -> bool:
    return not isinstance(error, SteerError) or next(folder.rglob("checkpoint-*"), None) is not None
