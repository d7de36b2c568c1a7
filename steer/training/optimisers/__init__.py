"""Optimisers: one file each, found by listing the folder, and through the entry point `steer.optimisers`.

An optimiser is a module with

    SUMMARY, SOURCE   what it does, and the paper or library it comes from
    OPTIONS           a tuple of vectors.options.Option, all of which `build` takes by name
    build(parameters, *, lr, weight_decay=0.0, seed=0, **options) -> torch.optim.Optimizer

`parameters` are pairs of name and parameter, as `model.named_parameters()` gives them; those that need no gradient are
left out. What `build` returns can be checkpointed and resumed by whatever drives torch's optimisers: schedulers find
`lr` in its `param_groups`, its `state_dict()` holds tensors, numbers, words and lists alone, so that
`torch.load(..., weights_only=True)` reads it, and what is loaded is matched by name, so the order of the parameters has
no meaning. Randomness comes from `seed` and the parameters' names. Built-ins are made of one class and rules; see
_optimiser.py, and _rounding.py for weights in bfloat16.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch

from vectors.errors import UsageError
from vectors.plugins import choose, discover

GROUP = "steer.optimisers"


def available() -> dict[str, ModuleType]:
    """Every optimiser, built in or from outside, by name."""
    return discover(__name__, GROUP)


def find(name: str) -> ModuleType:
    """The optimiser of that name. Raises UsageError that guesses what was meant."""
    return choose("optimiser", name, available())


def problems(name: str, *, lr: float, weight_decay: float = 0.0, **options: Any) -> list[str]:
    """What is wrong with the settings of an optimiser, one sentence each. Raises UsageError for an unknown one."""
    known = {option.name: option for option in find(name).OPTIONS}
    found = []
    if not (math.isfinite(lr) and lr > 0):
        found.append(f"the learning rate is {lr}, not a number above 0")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        found.append(f"the weight decay is {weight_decay}, not a number from 0 on")
    for key, value in options.items():
        if key in known:
            found += [problem for problem in [known[key].check(value)] if problem]
        else:
            near = difflib.get_close_matches(key, known, 1)
            guess = f"; did you mean {near[0]}?" if near else ""
            found.append(f"{name} has no option {key!r}{guess} (it has {', '.join(sorted(known)) or 'none'})")
    return found


def create(
    name: str,
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    lr: float,
    weight_decay: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> torch.optim.Optimizer:
    """Build the optimiser of that name, its settings checked. Raises UsageError with all that is wrong with them."""
    found = problems(name, lr=lr, weight_decay=weight_decay, **options)
    if found:
        raise UsageError(found, f"the options of {name} are listed in steer/training/optimisers/{name}.py")
    built: torch.optim.Optimizer = find(name).build(parameters, lr=lr, weight_decay=weight_decay, seed=seed, **options)
    return built
