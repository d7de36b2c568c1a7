"""An arm as the steering file of lm-evaluation-harness: `lm_eval --model steered --model_args steer_path=FILE`.

One hook point only. Its first version adds the last vector of a file at all hook points of a file, since its hooks
close over a loop's variable; and every version hooks every token, so that scopes can't be written.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from steer.evaluation.arms.arm import Arm
from vectors.errors import UsageError
from vectors.formats import lm_eval
from vectors.registry.layers import spans
from vectors.steering import SteeringVector


def problems_of(arm: Arm) -> list[str]:
    """Why an arm can't be written as one vector added at one layer; empty if it can."""
    if arm.composition is None:
        return [f"{arm.name} steers by no vector"]
    problems = []
    if arm.system is not None or arm.model is not None:
        problems.append(f"{arm.name} is more than its vectors: it has a system prompt or weights of its own")
    others = sorted({term.operation for term in arm.composition.terms} - {"add"})
    if others:
        what = ", ".join(each.replace("_", " to the ") for each in others)
        problems.append(f"{arm.name} does more than add ({what}), and the harness can only add at one layer")
    if any(term.scope is not None for term in arm.composition.terms):
        problems.append(f"{arm.name} has scopes, and the harness steers every token")
    if arm.composition.conditions:
        problems.append(f"{arm.name} has conditions, and the harness steers whatever the model reads")
    layers = sorted(_sums(arm)) if not others else []
    if len(layers) > 1:
        problems.append(f"{arm.name} acts at layers {spans(layers)}, and only one hook point is safe there")
    return problems


def write(path: Path, arm: Arm) -> str:
    """Write the file; returns its digest. Raises UsageError for an arm that can't be written, OutputError."""
    problems = problems_of(arm)
    if problems:
        raise UsageError(problems, "restrict the expression to one layer, as in warm[12]")
    ((layer, direction),) = _sums(arm).items()
    base = next(iter(arm.vectors.values())).base
    return lm_eval.write(path, SteeringVector({layer: direction}, {"base": dict(base)} if base else {}))


def _sums(arm: Arm) -> dict[int, Tensor]:
    """What the arm adds at each layer, float32 [hidden]."""
    assert arm.composition is not None
    sums: dict[int, Tensor] = {}
    for term in arm.composition.terms:
        vector = arm.vectors[term.name]
        for layer in vector.acting(term.layers):
            sums[layer] = sums.get(layer, torch.zeros_like(vector.layers[layer])) + term.value * vector.layers[layer]
    return sums
