"""Which commit broke a trait: a binary search over the history by evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from steer.store.history import graph
from steer.store.layout import Store
from vectors.errors import UsageError


class Found(NamedTuple):
    """The first commit below the threshold, the last above it, and every figure that was measured, by commit."""

    broken: str
    last_good: str
    figures: dict[str, float]
    threshold: float


def between(store: Store, good: str, bad: str) -> list[str]:
    """The commits from `good` to `bad`, oldest first, each the first parent of the next.

    Raises UsageError where `good` is not behind `bad`.
    """
    known, line = graph.load(store), [bad]
    while line[-1] != good:
        node = known.get(line[-1]) or graph.node(store, line[-1])
        if not node.parents:
            raise UsageError(
                f"{good[7:15]} is not behind {bad[7:15]}, by first parents", "give another commit: --good VERSION"
            )
        line.append(node.parents[0])
    return line[::-1]


def search(line: list[str], measure: Callable[[str], float], minimum: float | None = None) -> Found:
    """Search a line of commits for the first whose figure is below the threshold.

    The threshold is `minimum`, or half-way between the figures of the first and of the last commit. `measure` is called
    once for each of about log2(len(line)) + 2 commits. Raises UsageError where the ends do not lie on both sides.
    """
    if len(line) < 2:
        raise UsageError("the good and the bad version are the same", "steer log shows the versions")
    figures = {line[0]: measure(line[0])}
    figures[line[-1]] = measure(line[-1])
    first, last = figures[line[0]], figures[line[-1]]
    threshold = (first + last) / 2 if minimum is None else minimum
    if not last < threshold <= first:
        raise UsageError(
            f"the trait is not lost between them: {first:.3g} at {line[0][7:15]}, {last:.3g} at {line[-1][7:15]}, "
            f"and the threshold is {threshold:.3g}",
            "choose other versions, or another --minimum",
        )
    low, high = 0, len(line) - 1
    while high - low > 1:
        middle = (low + high) // 2
        figures[line[middle]] = measure(line[middle])
        low, high = (middle, high) if figures[line[middle]] >= threshold else (low, middle)
    return Found(line[high], line[low], figures, threshold)
