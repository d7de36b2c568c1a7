"""Scores: what is measured of a completion, one score per file.

A score is a module of this folder, or one that an outside package names under the entry-point group `steer.scores`,
with the names of `Score`. It measures one completion at a time, so that models are compared on the same completions,
in pairs. `probes.evaluation_set` says on which completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, cast

from torch import Tensor

from probes.models.completions import Completion
from probes.targets import Target
from vectors.errors import UsageError
from vectors.registry.plugins import choose, discover

Needs = Literal["completion", "logits", "base logits", "target"]  # each of them with the completion, and with logits
GROUP = "steer.scores"


class Measured(NamedTuple):
    """One completion, as a score sees it.

    `logits` [completion, vocabulary] are the model's before each token of the completion, float32; `base_logits` are
    those of the base; `target` is what a teacher predicts there. Each is None where the score does not need it.
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
        """The figure of several completions: `mean`, if nothing speaks against it."""


def mean(scores: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(scores) / len(scores)


def scores() -> dict[str, Score]:
    """Every score by name, built-in or of an outside package. Raises UsageError for a module that is none."""
    modules = discover("probes.scores", GROUP)
    names = ("SUMMARY", "SOURCE", "UNIT", "NEEDS", "score", "combine")
    problems = [
        f"the score {name!r} has no {missing}"
        for name, module in modules.items()
        for missing in names
        if not hasattr(module, missing)
    ]
    if problems:
        raise UsageError(problems, "probes/scores/__init__.py says what a score has; update the package, or remove it")
    return cast(dict[str, Score], modules)


def score(name: str) -> Score:
    """The score called `name`. Raises UsageError."""
    scores()
    return cast(Score, choose("score", name, discover("probes.scores", GROUP)))
