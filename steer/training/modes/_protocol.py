"""The contract of a mode: a module with these names."""

from __future__ import annotations

from typing import Any, Protocol

from vectors.events import OnEvent


class ModeModule(Protocol):
    """What a file of modes/ must define."""

    REQUEST: type  # the request type that the mode handles, from steer/training/requests.py

    def run(self, request: Any, *, on_event: OnEvent) -> dict[str, Any]:
        """Bake; returns the report as JSON values. Most build a `Mode` and hand it to `steer.training.bake.bake`."""
