"""`bake`: a typed request in, a report out; what Python and the command line share."""

from __future__ import annotations

from typing import Any

from steer.training import modes
from steer.training.requests import BakeRequest
from vectors.events import OnEvent, ignore


def bake(request: BakeRequest, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Bake a behaviour into weights, by the mode that the request's type belongs to; returns the report as JSON values.

    With several processes, rank 0 returns the report and the others an empty one. Raises
    UsageError, ExampleError, ArtifactError, ModelError, OutputError before any work; ProofError, TrainingError.
    """
    return modes.run(request, on_event=on_event)
