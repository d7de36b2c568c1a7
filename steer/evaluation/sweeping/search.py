"""The search of a sweep: the strength of each candidate within the budget, its effect there, and the choice.

Candidates are compared at equal cost: each at the greatest strength whose 95th percentile of the KL divergence on
neutral text stays within the budget. The choice is made on development items alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from probes.arms.equal_divergence import rounded, strengths_within
from steer.evaluation.sweeping.cells import Cells
from steer.evaluation.sweeping.measured import FAR, NEAR, Candidate, Items, NeutralText
from vectors.events import Event, OnEvent

STAGE = "sweeping"
MARGIN = 0.85  # of the budget: what a search for a strength spends, since other neutral text may cost more
GOLDEN = (math.sqrt(5) - 1) / 2


class Point(NamedTuple):
    """A candidate at a strength.

    `effect` is by how much it raises the mean figure of the development items, in nats; `margins` are the mean figures
    at `NEAR` multiples of the strength. `steady` says whether the means rise from the lesser to the greater, with the
    unsteered model's between. `within` says whether the cost is within the budget.
    """

    candidate: Candidate
    strength: float
    p95: float
    effect: float
    margins: list[float]
    steady: bool
    within: bool

    @property
    def opposite(self) -> bool:
        """Whether the means fall from the lesser multiple to the greater, with the unsteered model's between."""
        return self.margins[0] > self.margins[1] - self.effect > self.margins[1]

    def value(self) -> dict[str, object]:
        """The point as JSON values."""
        figures: dict[str, object] = {"method": self.candidate.method, "layers": list(self.candidate.layers)}
        named = self._asdict()
        del named["candidate"]
        return figures | named


class Trial(NamedTuple):
    """A candidate, and the strength that a search for its strength begins with."""

    candidate: Candidate
    first: float


class Search:
    """Points of candidates; a class because cells, texts and items live across candidates."""

    def __init__(
        self, cells: Cells, neutral: NeutralText, items: Items, budget: float, on_event: OnEvent, expected: int
    ) -> None:
        self.cells, self.neutral, self.items, self.budget = cells, neutral, items, budget
        self.on_event, self.expected = on_event, expected
        self.points: list[Point] = []
        (self.base,) = self.cells.figures({"base": True}, lambda: {"figures": items.figures([None])})["figures"]

    def cost(self, candidate: Candidate, strength: float) -> float:
        """The 95th percentile of the KL divergence."""

        def measure() -> dict[str, float]:
            (costs,) = self.neutral.costs([candidate.at(strength)])
            return costs

        key = {"cost of": candidate.digest, "layers": list(candidate.layers), "strength": strength}
        p95: float = self.cells.figures(key, measure)["p95"]
        self._progress()
        return p95

    def margins(self, candidate: Candidate, strength: float, multiples: Sequence[float] = NEAR) -> list[float]:
        """The mean figures of the items at multiples of the strength."""

        def measure() -> dict[str, list[list[float]]]:
            return {"figures": self.items.figures([candidate.at(strength * multiple) for multiple in multiples])}

        key = {
            "effect of": candidate.digest, "layers": list(candidate.layers), "strength": strength,
            "multiples": list(multiples),
        }  # fmt: skip
        rows = self.cells.figures(key, measure)["figures"]
        self._progress()
        return [sum(row) / len(row) for row in rows]

    def at(self, candidate: Candidate, strength: float, p95: float) -> Point:
        """The point of a candidate at a strength, whose cost is known."""
        base = sum(self.base) / len(self.base)
        margins = self.margins(candidate, strength) if strength else [base, base]
        steady = margins[0] < base < margins[1]
        effect = margins[1] - base
        point = Point(candidate, strength, p95, effect, margins, steady, strength > 0 and p95 <= self.budget)
        self.points.append(point)
        return point

    def throughout(self, point: Point) -> bool:
        """Whether the mean figure rises from the least of all multiples of the strength to the greatest."""
        (low, *_), (*_, high) = point.margins, point.margins
        far = self.margins(point.candidate, point.strength, FAR)
        return point.steady and far[0] < low and high < far[1]

    def within_budget(self, candidate: Candidate, first: float) -> Point:
        """The point of a candidate at the greatest strength within the budget."""

        def costs(strengths: Mapping[int, float]) -> dict[int, float]:
            return {index: self.cost(candidate, strength) for index, strength in strengths.items()}

        ((strength, p95),) = strengths_within(MARGIN * self.budget, [first], costs)
        return self.at(candidate, strength, p95)

    def on_grid(self, candidate: Candidate, strengths: Sequence[float]) -> Point:
        """The points of a candidate at given strengths; returns the best."""
        points = [self.at(candidate, strength, self.cost(candidate, strength)) for strength in sorted(strengths)]
        return chosen(points) or points[0]

    def point(self, trial: Trial, strengths: Sequence[float] = ()) -> Point:
        """The point of a trial: the best of given strengths, or that of the greatest strength within the budget."""
        candidate, first = trial
        return self.on_grid(candidate, strengths) if strengths else self.within_budget(candidate, first)

    def _progress(self) -> None:
        done = self.cells.measured + self.cells.reused
        self.on_event(Event(STAGE, min(done, self.expected), self.expected, "cells"))


def chosen(points: Sequence[Point]) -> Point | None:
    """The point with the largest effect of those within the budget, steady ones first and those that steer the other
    way last; None if there is none. So one that steers the other way is chosen only where all do."""
    within = (point for point in points if point.within)
    return max(within, key=lambda p: (p.steady, not p.opposite, p.effect), default=None)


def golden(count: int, point: Callable[[int], Point]) -> None:
    """Golden-section search for the largest effect of `count` candidates in a row; `point` measures each at most once.

    Kiefer 1953. The effect over the candidates is taken to rise and then to fall. Where neither of two candidates stays
    within the budget, nothing says on which side of them others do, so all that are left are measured.
    """
    measured: dict[int, float] = {}

    def effect(index: int) -> float:
        if index not in measured:
            found = point(index)
            measured[index] = found.effect if found.within else -math.inf
        return measured[index]

    low, high = 0, count - 1
    while high - low > 2:
        step = round(GOLDEN * (high - low))
        a, b = high - step, low + step
        if a >= b:
            a, b = (low + high) // 2, (low + high) // 2 + 1
        if max(effect(a), effect(b)) == -math.inf:
            break
        if effect(a) >= effect(b):
            high = b if b < high else b - 1
        else:
            low = a if a > low else a + 1
    for index in range(low, high + 1):
        effect(index)


def safe_strength(
    budget: float, strength: float, cost: Callable[[float], float], steps: int = 4
) -> tuple[float, float]:
    """The strength lowered until its cost on other text is within the budget too, and that cost."""
    p95 = cost(strength)
    for _ in range(steps):
        if p95 <= budget:
            break
        strength = rounded(strength * 0.97 * math.sqrt(budget / p95))
        p95 = cost(strength)
    return strength, p95
