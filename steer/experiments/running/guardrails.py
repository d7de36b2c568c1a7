"""Guardrails: whether an arm is surely worse than the control allows, or surely not, on the answers of one stage.

Both use one-sided bounds. A breach is looked for after every answer, so its bound holds at every look (a confidence
sequence); a step of the ramp is decided seldom, by bounds for one look. Answers are taken as independent, which those
of one conversation are not: a guardrail errs on the side of stopping.

Latencies change with the load, so those of the arms are of one period: of the latest answers of all arms together. Over
a window that moves, the sequence holds at every look until the window is full, and from then on for each look alone
(0.02 % at 4,000 answers): of an arm that is exactly at the limit, about 0.3 % of the windows that follow each other
have a look that errs. The control's percentile is as uncertain as its number of answers makes it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from steer.experiments import outcomes
from steer.experiments.statistics.bounds import one_sided
from steer.experiments.statistics.moments import Estimate, Sums, mean
from steer.experiments.statistics.sequences import difference

ALPHA = 0.02  # of the two-sided sequence: 1 % for the side that stops
TUNED_AT = 500  # answers at which the sequence is narrowest
FEWEST = 30  # answers of each arm before anything is concluded
INSIDE = 0.05  # level of the bounds that allow a step
LATENCIES = 4_000  # that are kept, the latest of all arms together: an arm with 1 % of the units has more than `FEWEST`
EXCEEDING = 0.05  # share of latencies above the 95th percentile
# What an excess is measured in; "of answers", a share of them, for the others.
UNITS = {"length_ratio": "tokens", "repetition": "of 4-grams"}


class Excess(NamedTuple):
    """By how much an arm exceeds what a guardrail allows: above 0 is worse. `low` and `high` bound it on one side each:
    the first at every look, the second for one look."""

    guardrail: str
    arm: str
    estimate: float
    low: float
    high: float


class Arm:
    """What the guardrails read of one arm: sums over its answers, and latencies of a period that all arms share."""

    def __init__(self) -> None:
        self.answers = self.errors = self.refusals = 0
        self.tokens, self.repetition = Sums(0, 0.0, 0.0), Sums(0, 0.0, 0.0)
        self.latencies: list[float] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Add an answer, given as a row of the exposures, to the sums."""
        if row["status"] == outcomes.GONE or outcomes.refused(row["status"]):  # which says nothing about the arm
            return
        self.answers += 1
        if outcomes.failed(row["status"]):
            self.errors += 1
            return
        self.refusals += bool(row.get("refusal"))
        self.tokens = _plus(self.tokens, row.get("response_tokens"))
        self.repetition = _plus(self.repetition, row.get("repetition"))

    @property
    def served(self) -> int:
        """Answers that did not fail."""
        return self.answers - self.errors


def _plus(sums: Sums, value: float | None) -> Sums:
    return sums if value is None else Sums(sums.units + 1, sums.y + value, sums.yy + value * value)


def excesses(control: Arm, other: Arm, name: str, limits: Mapping[str, float]) -> list[Excess]:
    """How the arm called `name` stands against each guardrail that can be judged already."""
    found = []
    for guardrail, limit in limits.items():
        pair = _estimates(guardrail, limit, control, other)
        for allowed, actual in pair:
            if min(allowed.units, actual.units) < FEWEST:
                continue
            sequence = difference(allowed, actual, alpha=ALPHA, tuned_at=TUNED_AT, fewest=FEWEST)
            _, high = one_sided(allowed, actual, INSIDE)
            found.append(Excess(guardrail, name, actual.mean - allowed.mean, sequence.low, high))
    return found


def _estimates(guardrail: str, limit: float, control: Arm, other: Arm) -> list[tuple[Estimate, Estimate]]:
    """Pairs of (what is allowed, what is) for a guardrail, whose difference must not be above 0."""
    if guardrail == "error_rate":
        return [(_raised(_share(control.errors, control.answers), limit), _share(other.errors, other.answers))]
    if guardrail == "refusals":
        return [(_raised(_share(control.refusals, control.served), limit), _share(other.refusals, other.served))]
    if guardrail == "repetition":
        return [(_raised(mean(control.repetition), limit), mean(other.repetition))]
    if guardrail == "length_ratio":  # too long, and too short
        long = _times(mean(control.tokens), limit), mean(other.tokens)
        return [long, (_times(mean(other.tokens), limit), mean(control.tokens))]
    if not control.latencies or not other.latencies:
        return []
    # No more of the arm's latencies may lie above the limit times the control's percentile than of the control's own
    # lie above the percentile.
    threshold, allowed = _exceeded(control.latencies)
    above = _share(sum(latency > limit * threshold for latency in other.latencies), len(other.latencies))
    return [(allowed, above)]


def _exceeded(latencies: Sequence[float]) -> tuple[float, Estimate]:
    """The 95th percentile of latencies (nearest rank), and the share of all such latencies that lie above it.

    The share below the k-th of n values is distributed as Beta(k, n + 1 - k), whatever the distribution of the values
    (David & Nagaraja 2003, Order Statistics, 2.1).
    """
    ordered, count = sorted(latencies), len(latencies)
    rank = math.ceil((1 - EXCEEDING) * count)
    share = (count + 1 - rank) / (count + 1)
    return ordered[rank - 1], Estimate(count, share, share * (1 - share) * count / (count + 2))


def _share(count: int, of: int) -> Estimate:
    """A share with one more success and failure, so that a share of 0 or 1 has a variance (Agresti & Coull 1998)."""
    share = (count + 1) / (of + 2)
    return Estimate(of, share, share * (1 - share))


def _raised(estimate: Estimate, by: float) -> Estimate:
    return estimate._replace(mean=estimate.mean + by)


def _times(estimate: Estimate, factor: float) -> Estimate:
    return estimate._replace(mean=estimate.mean * factor, variance=estimate.variance * factor**2)


class Guard:
    """The guardrails of one stage of an experiment: answers by arm, the breaches, and whether all arms are inside."""

    def __init__(self, control: str, arms: tuple[str, ...], limits: Mapping[str, float]) -> None:
        self.control, self.limits = control, limits
        self.arms = {name: Arm() for name in arms}
        self.latest: list[tuple[float, str, float]] = []  # when it was asked for, arm, latency; in order

    def add(self, row: Mapping[str, Any]) -> None:
        """Add an answer to an assigned unit, given as a row of the exposures. Those of other servers come late."""
        if row["arm"] not in self.arms:
            return
        self.arms[row["arm"]].add(row)
        if row["status"] < outcomes.FIRST_ERROR and row.get("latency") is not None:
            bisect.insort(self.latest, (row["at"], row["arm"], row["latency"]))
            del self.latest[:-LATENCIES]

    def excesses(self, only: str | None = None) -> list[Excess]:
        """How every arm, or only one, stands against every guardrail that can be judged already."""
        for arm in self.arms.values():
            arm.latencies = []
        for _, name, latency in self.latest:
            self.arms[name].latencies.append(latency)
        control = self.arms[self.control]
        others = [name for name in self.arms if name != self.control and only in (None, self.control, name)]
        return [excess for name in others for excess in excesses(control, self.arms[name], name, self.limits)]

    def breaches(self, only: str | None = None) -> list[Excess]:
        """The guardrails that an arm is surely outside of."""
        return [excess for excess in self.excesses(only) if excess.low > 0]

    def unsure(self, fewest: int) -> list[tuple[str, str]] | None:
        """The guardrails that an arm is not surely inside of, as (arm, guardrail); None before every arm has so many
        answers."""
        if min(arm.answers for arm in self.arms.values()) < max(fewest, FEWEST):
            return None
        found = self.excesses()
        outside = {(excess.arm, excess.guardrail) for excess in found if excess.high >= 0}
        inside = {(excess.arm, excess.guardrail) for excess in found} - outside
        needed = [(name, limit) for name in self.arms if name != self.control for limit in self.limits]
        return [each for each in needed if each not in inside]


def described(excess: Excess) -> str:
    """A breach in words."""
    by = f"{excess.estimate:.3g} {unit_of(excess.guardrail)}"
    return f"arm {excess.arm} is outside of the guardrail {excess.guardrail} by {by}"


def unit_of(guardrail: str) -> str:
    """What an excess of this guardrail is measured in."""
    return UNITS.get(guardrail, "of answers")
