"""The contract of an injection: a module with these names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from steer.folding.pending import PendingModel
from vectors.architectures import Checkpoint


class Injection(Protocol):
    """A way to add a constant to the residual stream by weights alone; a module serves as one.

    ORDER: without --via, injections are tried in ascending order. SUMMARY: one phrase for help texts and reports.
    """

    ORDER: int
    SUMMARY: str

    def refusal(self, pending: PendingModel, described: Checkpoint) -> str | None:
        """Why this model can't take the injection, or None."""

    def edit(self, pending: PendingModel, described: Checkpoint, added: Mapping[int, Tensor]) -> PendingModel:
        """The model with `added` ([hidden] float64 by layer) added to the outputs of those blocks."""
