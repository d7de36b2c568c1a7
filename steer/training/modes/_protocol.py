"""The contract of a mode: a module with these names."""

from __future__ import annotations

from typing import Any, Protocol

from vectors.events import OnEvent


class ModeModule(Protocol):
    """What a file of modes/ has."""

    REQUEST: type  # the typed request that it answers, see steer/training/requests.py

    def run(self, request: Any, *, on_event: OnEvent) -> dict[str, Any]:
        """Bake; returns the report as JSON values. Most build a `Mode` and hand it to `steer.training.bake.bake`."""
