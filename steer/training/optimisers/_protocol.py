"""The contract of an optimiser: a module with these names, here or named by a `steer.optimisers` entry point."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from vectors.registry.options import Option

Parameters = Iterable[tuple[str, nn.Parameter]]  # as `model.named_parameters()` gives them


class OptimiserModule(Protocol):
    """What a file of optimisers/ must define.

    The optimiser that `build` returns must work with schedulers, checkpoints and resuming as torch's own do: `lr` is in
    its `param_groups`; its `state_dict()` holds only tensors, numbers, strings and lists, so that
    `torch.load(..., weights_only=True)` reads it; and it loads a state by parameter name, in any order. All randomness
    is derived from `seed` and the parameters' names.
    """

    SUMMARY: str  # what it does, as one phrase
    SOURCE: str  # the paper or library
    OPTIONS: tuple[Option, ...]  # besides the learning rate and the weight decay

    def build(
        self, parameters: Parameters, *, lr: float, weight_decay: float, seed: int, **options: Any
    ) -> torch.optim.Optimizer:
        """An optimiser of the parameters that need a gradient; `options` has a value for each of OPTIONS."""
