"""The work folder of a bake, beside its output: samples and checkpoints, so that a killed run can be resumed.

It is bound to everything that the result follows from; the work of another run is refused, never mixed in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vectors import folders
from vectors.errors import SteerError


def path_of(out: Path) -> Path:
    """The work folder of an output."""
    return out.absolute().parent / f".{out.name}.bake"


def can_resume(out: Path, identity: Mapping[str, Any]) -> bool:
    """Whether this very run left work behind. Raises UsageError, which names what differs, for another run's work."""
    folder = path_of(out)
    folders.require_same_work(folder, identity)
    return folders.has_work(folder)


@contextlib.contextmanager
def work_folder(out: Path, identity: Mapping[str, Any]) -> Iterator[Path]:
    """Within: the locked work folder, which is removed at the end and stays after an interruption.

    A refusal before the first checkpoint leaves nothing, so that a corrected command is not refused for it. Raises
    UsageError, OutputError.
    """
    with folders.work_folder(out, identity, name=path_of(out).name, keep=_is_worth_keeping) as folder:
        yield folder


def _is_worth_keeping(folder: Path, error: BaseException) -> bool:
    return not isinstance(error, SteerError) or next(folder.rglob("checkpoint-*"), None) is not None
