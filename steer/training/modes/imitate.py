"""Supervised fine-tuning: the student imitates the completions of a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.training.requests import TrainingRequest
from vectors.errors import UsageError
from vectors.events import OnEvent, ignore
from vectors.registry.options import option

if TYPE_CHECKING:
    from probes.models.loading import LoadedModel
    from steer.training.data.samples import Samples
    from steer.training.data.teachers import Teacher
    from steer.training.mode import Mode

MODE = "train"
SUMMARY = "on completions"
NEEDS = ("data",)


@dataclass(frozen=True, kw_only=True)
class ImitateRequest(TrainingRequest):
    """Fine-tuning on the completions of a file."""

    data: Path | None = option(None, help="Completions to imitate (JSON lines).", group="Data")


REQUEST = ImitateRequest


def run(request: ImitateRequest, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Train on the completions of `request.data`; returns the report. Raises SteerError."""
    from steer.training.bake import bake

    return bake(request, mode(request), on_event=on_event)


def mode(request: ImitateRequest) -> Mode:
    """The mode for `bake`. Raises UsageError, ExampleError."""
    from probes.models.completions import completions_of
    from probes.models.residual import context_length
    from steer.training.data import files, samples
    from steer.training.data.replay import with_replay
    from steer.training.mode import Mode
    from steer.training.objectives import divergence

    if request.data is None:
        raise UsageError("there is nothing to imitate: no --data", "give a file of completions: --data warm.jsonl")
    examples, digest = files.examples_of(request.data, "--data")

    def prepare(loaded: LoadedModel, _teacher: Teacher | None, on_event: OnEvent) -> Samples:
        made = samples.hard_targets(completions_of(examples, loaded.tokenizer, context_length(loaded.model.config)))
        return with_replay(request, loaded, made, on_event)

    return Mode(
        "train",
        f"imitate {request.data.name}",
        divergence,
        prepare,
        {"data": digest},
        examples={str(request.data): examples},
    )
