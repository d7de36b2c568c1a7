"""An arm: one way to run a model, which is compared with others on the same items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from vectors.expression import Composition
from vectors.probe import Probe
from vectors.steering import SteeringVector

BASE = "base"  # the name of the unsteered model's arm


@dataclass(frozen=True)
class Arm:
    """A model, what steers it, and a system prompt; by default the base as it is.

    `model` is a model reference, an adapter's folder or a task vector's file; None is the base of the evaluation.
    `weight` is the factor of what an adapter or a task vector adds.
    `vectors` are those that the composition names, `probes` what its conditions read, which controls do not replace;
    its strengths are final.
    """

    name: str
    model: str | None = None
    composition: Composition | None = None
    vectors: Mapping[str, SteeringVector] = field(default_factory=dict)
    system: str | None = None
    weight: float = 1.0
    probes: Mapping[str, Probe | SteeringVector] = field(default_factory=dict)

    def scaled(self, factor: float, name: str = "") -> Arm:
        """The arm with its composition scaled. Raises ExpressionError for one that can't be."""
        composition = None if self.composition is None else self.composition.scaled(factor)
        return replace(self, name=name or self.name, composition=composition)
