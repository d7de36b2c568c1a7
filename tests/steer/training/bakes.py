"""Requests for short bakes of pico models, which tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer.training.api import bake
from steer.training.modes.contrast import ContrastRequest
from steer.training.modes.distil import DistilRequest
from steer.training.modes.imitate import ImitateRequest
from steer.training.modes.prefer import PreferRequest
from steer.training.requests import AdapterSettings, Replay, TrainingSettings
from vectors.steering import SteeringVector

WORDS = ("the", "warm", "cold", "is", "and", "yes", "no", "user", "sun", "rain")
NO_REPLAY = Replay(None, 0.0)


def short(folder: Path, out: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The fields of a short bake: 30 steps, an adapter of rank 8; `settings` in the changes are numbers of training."""
    numbers = {"steps": 30, "lr": 1e-2, "batch": 8, "evaluate_every": 10, **changes.pop("settings", {})}
    fields = {"adapter": AdapterSettings(lora_rank=8, lora_alpha=16), **changes}
    return {"model": str(folder), "out": out, "settings": TrainingSettings(**numbers), **fields}


def imitating(data: Path, folder: Path, out: Path, **changes: Any) -> ImitateRequest:
    return ImitateRequest(data=data, **short(folder, out, changes))


def preferring(pairs: Path, folder: Path, out: Path, **changes: Any) -> PreferRequest:
    return PreferRequest(pairs=pairs, **short(folder, out, changes))


def contrasting(data: Path, against: Path, folder: Path, out: Path, **changes: Any) -> ContrastRequest:
    return ContrastRequest(data=data, against=against, **short(folder, out, changes))


def distilling(vector: SteeringVector | Path, prompts: Path, folder: Path, out: Path, **changes: Any) -> DistilRequest:
    given: dict[str, Any] = {
        "composition": "warm", "vectors": {"warm": vector}, "prompts": prompts, "tokens": 8, "any_base": True,
        **short(folder, out, changes),
    }  # fmt: skip
    return DistilRequest(**given)


def distilled(folder: Path, vector: SteeringVector | Path, prompts: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return bake(distilling(vector, prompts, folder, out, **changes))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
