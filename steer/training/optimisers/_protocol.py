"""The contract of an optimiser: a module with these names, here or named by a `steer.optimisers` entry point."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from vectors.options import Option

Parameters = Iterable[tuple[str, nn.Parameter]]  # as `model.named_parameters()` gives them


class OptimiserModule(Protocol):
    """What a file of optimisers/ has.

    What `build` returns can be checkpointed and resumed by whatever drives torch's optimisers: schedulers find `lr` in
    its `param_groups`; its `state_dict()` holds only tensors, numbers, strings and lists, so that
    `torch.load(..., weights_only=True)` reads it; and loading matches by name, so that the order of the parameters has
    no meaning. Randomness comes from `seed` and the parameters' names.
    """

    SUMMARY: str  # what it does, as one phrase
    SOURCE: str  # the paper or library
    OPTIONS: tuple[Option, ...]  # beside the learning rate and the weight decay

    def build(
        self, parameters: Parameters, *, lr: float, weight_decay: float, seed: int, **options: Any
    ) -> torch.optim.Optimizer:
        """The optimiser over those parameters that need a gradient; `options` has a value for each of OPTIONS."""
