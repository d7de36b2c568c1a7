"""Shares of items, and their intervals, where items share groups too.

A design effect that is estimated from a few rare hits is worth little, and from none nothing: if all values are equal,
the sample is the same whether the items of a group always agree or have nothing to do with each other (Dean & Pagano
2015, Journal of Survey Statistics and Methodology 3, compare intervals of shares in clusters).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from probes.intervals import CONFIDENCE
from probes.statistics.clusters import clusters_of, standard_error
from probes.statistics.paired import normal_quantile, student_quantile


def proportion(hits: Tensor, groups: Sequence[str] | None = None) -> tuple[float, float, float]:
    """The share of hits (0 or 1) [items], and its 95 % score interval (Wilson 1927).

    Where items share groups they count as fewer, by the design effect and by Student's quantile of so few groups (Korn
    & Graubard 1998, Survey Methodology 24). In simulations of shares from 3 % to 50 % with 8 groups or more, equal and
    unequal ones, it covers in 93 % of draws or more, whether the items of a group are independent, alike or identical.
    The price where they are independent: at 40 groups of 5 it is a tenth wider than without groups; at 8 it is a third
    wider for a share of 30 %, and twice as wide for one of 5 %. Fewer groups make it wide, a single one 0 to 1.
    """
    share, count = float(hits.double().mean()), len(hits) / design_effect(hits, groups)
    sizes = clusters_of(hits, groups).sizes
    if len(sizes) < len(hits):
        if len(sizes) < 2:
            return share, 0.0, 1.0
        # Unequal groups tell as much about the variation between them as fewer equal ones.
        degrees = max(1, int(_alike(sizes)) - 1)
        count *= (student_quantile(CONFIDENCE, len(hits) - 1) / student_quantile(CONFIDENCE, degrees)) ** 2
    z = normal_quantile(0.975)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return share, max(0.0, middle - half), min(1.0, middle + half)


def design_effect(hits: Tensor, groups: Sequence[str] | None) -> float:
    """How many times larger groups make the variance of the share of hits (0 or 1) [items], at least 1 (Kish 1965).

    The estimate counts once for each group that tells something about it, and once counts what it would be if the items
    of each group were identical: the rarer of hits and misses must stand in several groups before independence is
    believed. Where all values are equal, items count as identical within their groups.
    """
    clusters = clusters_of(hits, groups)
    sizes = clusters.sizes
    if len(sizes) == len(hits):
        return 1.0
    identical = len(hits) / _alike(sizes)
    alone, together = standard_error(clusters_of(hits)), standard_error(clusters)
    if not alone > 0 or math.isnan(together):
        return identical
    estimate = max(1.0, (together / alone) ** 2)
    if estimate >= identical:
        return estimate
    several = sizes > 1
    with_hits = int((several & (clusters.sums > 0)).sum())
    with_misses = int((several & (clusters.sums < sizes)).sum())
    weight = min(with_hits, with_misses)
    return (weight * estimate + identical) / (weight + 1)


def _alike(sizes: Tensor) -> float:
    """How many independent items are worth as much as groups of identical ones: (sum of n)^2 / sum of n^2."""
    return float(sizes.sum().square() / sizes.square().sum())
