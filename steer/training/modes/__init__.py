"""Training modes of a bake: one per file, discovered in this folder; _protocol.py says what a mode must define."""

from __future__ import annotations

from typing import Any, cast

from steer.training.modes._protocol import ModeModule
from steer.training.requests import TrainingRequest
from vectors.events import OnEvent, ignore
from vectors.registry.plugins import discover

GROUP = "steer.bake_modes"


def run(request: TrainingRequest, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Bake by the mode whose request type this is; returns the report. Raises SteerError."""
    for module in cast(dict[str, ModeModule], discover(__name__, GROUP)).values():
        if type(request) is module.REQUEST:
            return module.run(request, on_event=on_event)
    raise TypeError(f"no mode takes a {type(request).__name__}")
