"""Where the arms that share the base's weights run: hooks in transformers, or an engine that a caller brings along.

An engine gives the same figures, within rounding; what differs is speed, and what is proved by it: that the server does
to the model what was evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from probes.models.loading import LoadedModel, OpenedModel
from steer.evaluation.arms.arm import Arm
from steer.evaluation.measuring import divergences, figures, generations
from steer.evaluation.measuring.divergences import Neutral
from steer.evaluation.measuring.equal_divergence import Measure
from steer.evaluation.measuring.generations import Generation
from steer.evaluation.suites.items import Item
from vectors.events import OnEvent, ignore


class Engine(Protocol):
    """What an engine does for all arms of the base at once; see the functions of the same names for the meanings."""

    def measure_arms(self, items: Sequence[Item], arms: Sequence[Arm]) -> Tensor:
        """The figure of every item under every arm, float64 [arms, items], in nats."""

    def measure_divergences(self, neutral: Neutral, arms: Sequence[Arm]) -> list[Tensor]:
        """KL(base || arm) of every token of the neutral continuations, float64 [tokens], for each arm, in nats."""

    def generate_arms(
        self, arms: Sequence[Arm], prompts: Sequence[str], max_tokens: int
    ) -> dict[str, list[Generation]]:
        """The greedy answer of each arm to each prompt, by the name of the arm."""


# From the base, and what is called with progress, to a context in which an engine runs it.
Start = Callable[[LoadedModel, OnEvent], AbstractContextManager[Engine]]
# From the base without its weights, the arms of the subjects, and given markers of sections, to what starts the engine.
# Raises UsageError for what the engine can't run, before weights are loaded.
Through = Callable[[OpenedModel, Sequence[Arm], Mapping[str, Sequence[str]]], Start]


def measured_once(engine: Engine, neutral: Neutral) -> Measure:
    """The engine's divergences of arms of the base on this text, where arms that are the same are measured once: the
    negation is a point of the curve, and a search for a strength has measured the arm that it ends with."""
    known: dict[Hashable, tuple[Arm, Tensor]] = {}  # the arms too, since their vectors are told apart by identity

    def measure(arms: Sequence[Arm]) -> list[Tensor]:
        fresh = {_key(arm): arm for arm in arms if _key(arm) not in known}
        values = engine.measure_divergences(neutral, list(fresh.values())) if fresh else []
        known.update({key: (arm, value) for (key, arm), value in zip(fresh.items(), values, strict=True)})
        return [known[_key(arm)][1] for arm in arms]

    return measure


def _key(arm: Arm) -> Hashable:
    composition = None if arm.composition is None else arm.composition.digest
    read = [(name, id(each)) for name, each in sorted({**arm.probes, **arm.vectors}.items())]
    return arm.system, composition, tuple(read)


class Hooks:
    """Steering through hooks in transformers: the reference, and the only way for arms with weights of their own."""

    def __init__(self, loaded: LoadedModel, any_base: bool = False, on_event: OnEvent = ignore) -> None:
        self.loaded, self.any_base, self.on_event = loaded, any_base, on_event

    def measure_arms(self, items: Sequence[Item], arms: Sequence[Arm]) -> Tensor:
        """The figure of every item under every arm, float64 [arms, items], in nats."""
        return figures.measure_arms(self.loaded, items, arms, any_base=self.any_base, on_event=self.on_event)

    def measure_divergences(self, neutral: Neutral, arms: Sequence[Arm]) -> list[Tensor]:
        """KL(base || arm) of every token of the neutral continuations, float64 [tokens], for each arm, in nats."""
        return divergences.measure_divergences(
            self.loaded, neutral, arms, any_base=self.any_base, on_event=self.on_event
        )

    def generate_arms(
        self, arms: Sequence[Arm], prompts: Sequence[str], max_tokens: int
    ) -> dict[str, list[Generation]]:
        """The greedy answer of each arm to each prompt, by the name of the arm."""
        return generations.generate_arms(
            self.loaded, arms, prompts, max_tokens=max_tokens, any_base=self.any_base, on_event=self.on_event
        )
