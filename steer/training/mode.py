"""The contract of a training mode: what a mode supplies to `bake`, which trains, writes and evaluates for all modes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from probes.data.examples import Example
from probes.models.loading import LoadedModel
from steer.training.data.samples import Samples
from steer.training.data.teachers import Teacher
from steer.training.objectives.protocol import Objective
from vectors.events import OnEvent


class Mode(NamedTuple):
    """A way of training: its name, the behaviour it teaches, its objective, and how its samples are made."""

    name: str
    behaviour: str
    objective: Objective
    prepare: Callable[[LoadedModel, Teacher | None, OnEvent], Samples]
    inputs: Mapping[str, Any]  # digests of the files that it reads, by name
    teacher: Callable[[LoadedModel], Teacher] | None = None
    examples: Mapping[str, Sequence[Example]] = {}  # what it trains on, by file
    first_layer: int = 0  # the lowest layer that gets an adapter
