"""Where the arms that share the base's weights run: hooks in transformers, or an engine that a caller brings along.

An engine gives the same figures, within rounding; what differs is speed, and what is proved by it: that the server does
to the model what was evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from probes.models.loading import LoadedModel
from steer.evaluation.arms.arm import Arm
from steer.evaluation.measuring import divergences, figures, generations
from steer.evaluation.measuring.divergences import Neutral
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
Through = Callable[[LoadedModel, OnEvent], AbstractContextManager[Engine]]


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
