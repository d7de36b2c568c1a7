"""The request of a sweep, and the texts that it is made on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from probes.arms import BUDGET
from probes.data import prompts as everyday
from steer.evaluation.suites.items import Item, metric_of
from steer.evaluation.sweeping.measured import Candidate
from vectors.errors import UsageError

NEUTRAL = 16  # built-in prompts that are continued, of each kind


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a sweep searches.

    `layers` is text as of `groups.parse_groups`; `strengths` are a grid, or empty for the greatest strength within the
    budget; `examples` are the sizes of a learning curve. `folder` is where cells and the report are written, or None.
    """

    layers: str = "auto"
    strengths: tuple[float, ...] = ()
    examples: tuple[int, ...] = ()
    budget: float = BUDGET
    seed: int = 0
    any_base: bool = False
    folder: Path | None = None

    def problems(self) -> list[str]:
        """What is wrong with the settings."""
        problems = []
        if not self.budget > 0:
            problems.append(f"the budget of {self.budget:g} nats is not positive")
        problems += [f"the strength {strength:g} is not positive" for strength in self.strengths if not strength > 0]
        problems += [f"a learning curve from {size} examples is not possible" for size in self.examples if size < 2]
        return problems


def require_possible(problems: Sequence[str], strengths: Sequence[float] = ()) -> None:
    """Refuse settings that have problems. Raises UsageError."""
    if problems:
        other_way = any(strength < 0 for strength in strengths)
        both = "exchange the two classes, here and in the `steer extract` that made the vector"
        hint = f"; to steer the other way, {both}" if other_way else ""
        raise UsageError(list(problems), f"`steer sweep --help` lists what is allowed{hint}")


class Sides(NamedTuple):
    """The items of both sides, and neutral prompts: those to choose by, and others to check the choice on."""

    dev: list[Item]
    test: list[Item]
    neutral: list[str]
    check: list[str]


def sides_of(dev: Sequence[Item], test: Sequence[Item], neutral: Sequence[str]) -> Sides:
    """The sides of a sweep. Raises UsageError where one is empty, or where pairs and choices are mixed."""
    if len({metric_of(item) for item in (*dev, *test)}) > 1:
        raise UsageError(
            "the items are pairs and choices, whose figures have different units", "sweep over one kind at a time"
        )
    empty = [name for name, items in (("development", dev), ("test", test)) if not items]
    if empty:
        raise UsageError(
            f"there are no items for: {', '.join(empty)}", "give more examples, about 20 of each class or more"
        )
    given = list(neutral)
    if given:
        half = (len(given) + 1) // 2
        return Sides(list(dev), list(test), given[:half], given[half:] or given)
    return Sides(list(dev), list(test), everyday.held_out()[:NEUTRAL], everyday.for_training()[:NEUTRAL])


class Source(NamedTuple):
    """Where candidates come from.

    `layers` are those that there are directions for; `candidate` makes one of a method and a group of layers; `inputs`
    are digests for the record. `subset` makes one of a few examples: of the method, the layers, their number and the
    repeat; None where there is nothing to extract from, else up to `most` of each class.
    """

    methods: list[str]
    layers: list[int]
    candidate: Callable[[str, tuple[int, ...]], Candidate]
    inputs: dict[str, Any]
    subset: Callable[[str, tuple[int, ...], int, int], Candidate] | None = None
    most: int = 0
