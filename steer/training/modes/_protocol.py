"""The contract of a bake mode: a module with these names."""

from __future__ import annotations

from typing import Any, Protocol

from steer.training.requests import BakeRequest
from vectors.events import OnEvent


class ModeModule(Protocol):
    """What a file of modes/ must define.

    The file is imported for `steer bake --help`, so torch and what imports it are imported inside `run`.
    """

    MODE: str  # the value of --mode; several files may share one, each with inputs of its own
    SUMMARY: str  # how it bakes, for the help of --mode
    REQUEST: type[BakeRequest]  # a frozen dataclass, from whose fields the options of `steer bake` are derived
    NEEDS: tuple[str, ...]  # fields of REQUEST: of the files that share MODE, the one with most of these given is run

    def run(self, request: Any, *, on_event: OnEvent) -> dict[str, Any]:
        """Bake; returns the report as JSON values. Raises UsageError with all problems of the request, before any work.

        A mode that trains builds a `steer.training.mode.Mode` and hands it to `steer.training.bake.bake`.
        """
