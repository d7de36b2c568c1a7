"""The work folder of a bake, beside its output: samples and checkpoints, so that a killed run can be resumed.

It records everything that determines the result, and a run with other settings is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vectors.errors import SteerError
from vectors.storage import folders


def path_of(out: Path) -> Path:
    """The work folder of an output."""
    return out.absolute().with_name(folders.hidden_name(out, "bake"))


def can_resume(out: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a run of the same identity left work. Raises UsageError, which names what differs, for another's."""
    folder = path_of(out)
    folders.require_same_work(folder, identity)
    return folders.has_work(folder)


@contextlib.contextmanager
def work_folder(out: Path, identity: Mapping[str, Any]) -> Iterator[Path]:
    """Within: the locked work folder, which is removed at the end and stays after an interruption.

    After an error before the first checkpoint it is removed too, so that a corrected command can start. Raises
    UsageError, OutputError.
    """
    with folders.work_folder(out, identity, name=path_of(out).name, keep=_is_worth_keeping) as folder:
        yield folder


def _is_worth_keeping(folder: Path, error: BaseException) -> bool:
    return not isinstance(error, SteerError) or next(folder.rglob("checkpoint-*"), None) is not None
