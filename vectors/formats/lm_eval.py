"""Steering files of lm-evaluation-harness's `steered` model: a `.pt` dictionary by hook point.

A hook point is a module's name inside `model.base_model`, `layers.12` for most families; the harness adds
`steering_coefficient * steering_vector` to that module's output at every position, so `layers.{i}` is our layer i. It
asks for `action` and `steering_vector` [hidden], converts dtype and device itself, and fails on a `bias` with `add`.
(Its first version, which knows no `head_index`, adds the last vector of a file at all hook points.)

Source: EleutherAI/lm-evaluation-harness `lm_eval/models/hf_steered.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from vectors.errors import ArtifactError
from vectors.formats import _pt
from vectors.formats._common import AGAIN, direction, family, imported, save, warn_if_all_act
from vectors.steering import SteeringVector

SUMMARY = ".pt dictionary by hook point of lm-evaluation-harness's steered model"
SUFFIXES = ()

# The name of the list of blocks in transformers' base model, for families where it is not `layers`.
_BLOCKS = {name: "h" for name in ("gpt2", "gptj", "gptneo", "gptbigcode", "bloom", "falcon", "codegen")}
_BLOCKS |= {"mpt": "blocks", "opt": "decoder.layers"}
_HOOK = re.compile(
    r"(?:(?:base_model|model|transformer|gpt_neox|language_model|decoder)\.)*"
    r"(?:layers|h|blocks)\.([0-9]{1,6})(?:\.hook_resid_post)?"
)


def reads(path: Path) -> bool:
    """Whether the file holds a dictionary of dictionaries that have a steering vector."""
    value = _pt.load(path)
    return isinstance(value, dict) and bool(value) and all(_is_entry(key, value[key]) for key in value)


def read(path: Path) -> SteeringVector:
    """Read the entries that add to a block's output, multiplied by their coefficient.

    Warns that the base is unverified. Raises ArtifactError that lists every entry of another kind.
    """
    value = _pt.load(path)
    layers: dict[int, Tensor] = {}
    problems = []
    for hook, entry in value.items() if isinstance(value, dict) else ():
        match = _HOOK.fullmatch(hook) if _is_entry(hook, entry) else None
        action, coefficient = (entry.get("action"), entry.get("steering_coefficient", 1.0)) if match else (None, 1.0)
        if not match:
            problems.append(f"{path}: the hook point {hook!r} is not the output of a block")
        elif action != "add":
            problems.append(f"{path}: the action at {hook} is {action!r}; only add is a steering vector")
        elif entry.get("head_index") is not None or entry.get("bias") is not None:
            problems.append(
                f"{path}: the entry at {hook} has a head_index or a bias, which a steering vector can't have"
            )
        elif type(coefficient) not in (int, float) or not abs(coefficient) < 1e38:
            problems.append(f"{path}: the steering_coefficient at {hook} is not a number within the range of float32")
        elif int(match[1]) in layers:
            problems.append(f"{path}: {hook} is the same block as another hook point")
        else:
            layers[int(match[1])] = direction(path, hook, entry["steering_vector"]) * coefficient
    if problems:
        raise ArtifactError(problems, "keep only the entries with action add at the output of a block")
    if not layers:
        raise ArtifactError(f"{path} is not a steering file of lm-evaluation-harness", AGAIN)
    return imported(path, layers, "lm_eval")


def write(path: Path, vector: SteeringVector) -> str:
    """Write one entry per layer with action `add` and coefficient 1. The format has no metadata.

    The hook points are those of the base's model family, or `layers.{i}` if it is unknown. Warns when the harness would
    apply layers that do not act by default.
    """
    blocks = _BLOCKS.get(family(vector.base), "layers")
    entries = {f"{blocks}.{i}": _entry(values) for i, values in vector.layers.items()}
    warn_if_all_act(path, vector, "lm-evaluation-harness")
    return save(path, _pt.dump(entries))


def _entry(values: Tensor) -> dict[str, Any]:
    return {
        "steering_vector": values.clone(),
        "steering_coefficient": 1.0,
        "action": "add",
        "bias": None,
        "head_index": None,
    }


def _is_entry(key: object, entry: object) -> bool:
    return isinstance(key, str) and isinstance(entry, dict) and "steering_vector" in entry
