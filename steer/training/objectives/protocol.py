"""The contract of an objective: a module with these names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from steer.training.data.samples import Sample


@dataclass(frozen=True)
class ObjectiveSettings:
    """The numbers that objectives read."""

    beta: float = 0.1  # of DPO: the greater, the closer the student stays to the base


class Objective(Protocol):
    """A loss that training minimises, and how its batches are made."""

    SUMMARY: str  # what it does, as one phrase
    SOURCE: str  # the paper

    def collate(self, samples: Sequence[Sample], pad: int) -> dict[str, Tensor]:
        """A batch of tensors; those of objectives/divergence.py are read by the forward pass."""

    def loss(self, batch: Mapping[str, Tensor], logits: Tensor, settings: ObjectiveSettings) -> Tensor:
        """A scalar, from the logits [count, vocabulary] before each token of a completion, row after row."""
