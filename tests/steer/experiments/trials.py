"""Experiments and logs for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from steer.experiments import document
from steer.experiments.specification import Experiment
from vectors.steering import SteeringVector
from vectors.storage.files import canonical_json

HIDDEN = 8


def vector(folder: Path, name: str, **metadata: Any) -> Path:
    """A vector of four layers beside the experiments of a folder."""
    file = folder / f"{name}.safetensors"
    SteeringVector({i: torch.full((HIDDEN,), float(len(name) + i)) for i in range(4)}, metadata).save(file)
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
