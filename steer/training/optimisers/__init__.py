"""Optimisers: one per file, discovered in this folder and through the entry point `steer.optimisers`.

_protocol.py says what an optimiser must have. The built-ins are update rules of one class, in _optimiser.py;
_rounding.py rounds bfloat16 weights so that small steps are not lost.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from steer.training.optimisers._protocol import OptimiserModule, Parameters
from vectors.errors import UsageError, guess
from vectors.registry.plugins import choose, discover_as

GROUP = "steer.optimisers"


def available() -> dict[str, OptimiserModule]:
    """Every optimiser, built in or from outside, by name."""
    return discover_as(OptimiserModule, "optimiser", __name__, GROUP)


def find(name: str) -> OptimiserModule:
    """The optimiser of that name. Raises UsageError, which suggests a similar name."""
    return choose("optimiser", name, available())


def problems_of(name: str, *, lr: float, weight_decay: float = 0.0, **options: Any) -> list[str]:
    """What is wrong with the settings of an optimiser, one sentence each. Raises UsageError for an unknown one."""
    by_name = {option.name: option for option in find(name).OPTIONS}
    problems = []
    if not (math.isfinite(lr) and lr > 0):
        problems.append(f"the learning rate is {lr}, not a number above 0")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        problems.append(f"the weight decay is {weight_decay}, not a number from 0 on")
    for key, value in options.items():
        if key in by_name:
            problems += [problem for problem in [by_name[key].problem_of(value)] if problem]
        else:
            problems.append(
                f"{name} has no option {key!r}{guess(key, by_name)}; it has {', '.join(sorted(by_name)) or 'none'}"
            )
    return problems


def create(
    name: str,
    parameters: Parameters,
    *,
    lr: float,
    weight_decay: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> torch.optim.Optimizer:
    """Check the settings and build the optimiser of that name. Raises UsageError with all problems of the settings."""
    problems = problems_of(name, lr=lr, weight_decay=weight_decay, **options)
    if problems:
        raise UsageError(problems, f"the options of {name} are listed in steer/training/optimisers/{name}.py")
    module = find(name)
    complete = {option.name: option.default for option in module.OPTIONS} | options
    return module.build(parameters, lr=lr, weight_decay=weight_decay, seed=seed, **complete)
