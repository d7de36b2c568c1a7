"""Experiments and logs for the tests of this folder."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steer.experiments import document
from steer.experiments.assignment import hashed
from steer.experiments.specification import Experiment
from steer.experiments.storage import state
from steer.experiments.storage.database import open_log, write
from vectors.steering import SteeringVector
from vectors.storage.files import canonical_json

HIDDEN, LAYERS = 8, 4


def vector(folder: Path, name: str, **metadata: Any) -> Path:
    """A vector of four layers beside the experiments of a folder."""
    file = folder / f"{name}.safetensors"
    SteeringVector({i: torch.full((HIDDEN,), float(len(name) + i)) for i in range(LAYERS)}, metadata).save(file)
    return file


def values(**changes: Any) -> dict[str, Any]:
    """The values of an experiment's file, with changes; None removes a key."""
    made = {
        "name": "tone",
        "salt": "tone-0123456789",
        "arms": {"control": {}, "friendly": {"steer": "1.2*warm"}},
        "metric": {"name": "thumbs", "smallest_effect": 0.05},
        **changes,
    }
    return {key: value for key, value in made.items() if value is not None}


def written(folder: Path, **changes: Any) -> Path:
    """The file of an experiment, with the vector that its arm names."""
    if not (folder / "warm.safetensors").exists():
        vector(folder, "warm")
    file = folder / "tone.yaml"
    file.write_text(canonical_json(values(**changes)))
    return file


def experiment(folder: Path, **changes: Any) -> Experiment:
    """A checked experiment."""
    return document.read(written(folder, **changes))


Ab = Callable[..., tuple[int, Any, str]]  # status, the JSON object and stderr of `steer ab` with these words


class Log:
    """A served experiment whose rows a test writes."""

    def __init__(self, folder: Path, url: str, **changes: Any) -> None:
        written(folder, log=url.replace("+psycopg", ""), **changes)
        self.experiment = document.read(folder / "tone.yaml")
        self.engine = open_log(self.experiment.log)
        self.version = state.register(self.engine, self.experiment)

    def answer(self, arm: str, unit: str, response: str = "", **more: Any) -> dict[str, Any]:
        return {
            "id": uuid.uuid4().hex, "experiment": "tone", "version": self.version, "arm": arm, "reason": "assigned",
            "stage": 0, "counted": True, "at": time.time(), "unit": hashed(self.experiment.salt, unit),
            "unit_source": "user", "conversation": hashed(self.experiment.salt, unit + "c", "conversation"),
            "response": response or uuid.uuid4().hex, "digest": "d", "status": 200, "response_tokens": 10, **more,
        }  # fmt: skip

    def said(self, response: str | None, **more: Any) -> dict[str, Any]:
        return {
            "id": uuid.uuid4().hex, "experiment": "tone", "version": 1, "response": response, "metric": "thumbs",
            "source": "user", "mark": "", "at": time.time(), **more,
        }  # fmt: skip

    def write(self, table: str, *rows: dict[str, Any]) -> None:
        write(self.engine, [(table, row) for row in rows])
