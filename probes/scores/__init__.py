"""Scores: what is measured of a completion, one score per file.

A score is a module of this folder, or one that an outside package names under the entry-point group `steer.scores`,
with the names of `Score`. It measures one completion at a time, so that models are compared on the same completions,
in pairs. `probes.evaluation_set` says on which completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from probes.models.completions import Completion
from probes.targets import Target
from vectors.registry.plugins import choose, discover_as

# What a score reads: each of these comes with the completion, and the last two with the logits.
Needs = Literal["completion", "logits", "base logits", "target"]
GROUP = "steer.scores"


class Measured(NamedTuple):
    """One completion, as a score sees it.

    `logits` float32 [tokens, vocabulary] are the model's before each token of the completion; `base_logits` are those
    of the base; `target` is what should be predicted there. Each is None where the score does not need it.
    """

    completion: Completion
    logits: Tensor | None = None
    base_logits: Tensor | None = None
    target: Target | None = None


class Score(Protocol):
    """What a score's module holds."""

    SUMMARY: str  # one line: what it is
    SOURCE: str  # where it comes from: a paper, or "" for common knowledge
    UNIT: str  # such as "nats per token"
    NEEDS: Needs

    def score(self, measured: Measured) -> float:
        """The score of one completion."""

    def combine(self, scores: Sequence[float]) -> float:
        """The figure of several completions, from the score of each; most modules use `mean`."""


def mean(scores: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(scores) / len(scores)


def scores() -> dict[str, Score]:
    """Every score by name, built-in or of an outside package. Raises UsageError for a module that lacks a name."""
    return discover_as(Score, "score", __name__, GROUP)


def score(name: str) -> Score:
    """The score called `name`. Raises UsageError."""
    return choose("score", name, scores())
