"""The learning curve: how many examples a behaviour needs.

For each number of examples, several subsets are drawn, a direction is made of each at one layer, and its effect on the
development items is measured at the same cost: the greatest strength within the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch

from probes.seeds import child_seed
from probes.statistics.paired import difference
from steer.evaluation.sweeping.search import Point

REPEATS = 5


def subset(size: int, positives: int, negatives: int, paired: bool, seed: int, repeat: int) -> list[int]:
    """The numbers of `size` examples of each class, drawn without replacement; of pairs both sides."""
    generator = torch.Generator().manual_seed(child_seed(seed, "examples", size, repeat))
    first = torch.randperm(positives, generator=generator)[:size].tolist()
    second = first if paired else torch.randperm(negatives, generator=generator)[:size].tolist()
    return [*first, *(positives + number for number in second)]


def repeats_of(sizes: Sequence[int], most: int, repeats: int = REPEATS) -> list[tuple[int, int]]:
    """Each size, ascending, and from how many subsets: `most` examples are all, so there is one."""
    return [(size, 1 if size >= most else repeats) for size in sorted(set(sizes))]


def curve(
    sizes: Sequence[int], most: int, effect: Callable[[int, int], Point], repeats: int = REPEATS
) -> list[dict[str, Any]]:
    """For each size the mean effect over repeats, and its 95 % interval.

    `effect` measures a subset of a size and the number of the repeat. A size of `most` examples, which are all, has one
    repeat, and no interval.
    """
    rows = []
    for size, count in repeats_of(sizes, most, repeats):
        points = [effect(size, repeat) for repeat in range(count)]
        effects = [point.effect for point in points]
        low, high = math.nan, math.nan
        if len(effects) > 1:
            _, low, high, *_ = difference(torch.tensor(effects, dtype=torch.float64))
        rows.append(
            {
                "examples": size, "repeats": len(effects), "effect": fmean(effects), "low": low, "high": high,
                "strength": fmean(point.strength for point in points), "effects": effects,
            }
        )  # fmt: skip
    return rows
