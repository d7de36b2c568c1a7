"""Many figures of the same items, such as those of every head of a model: their means, corrected for their number.

A bootstrap of 2,000 resamples gives no p-value below 1 / 2,001, so Holm's correction could find nothing among more than
a hundred figures. The greatest of all figures in each resample can: items are drawn for all figures at once, and what
figures of the same items have in common costs no power.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from probes.intervals import CONFIDENCE
from probes.statistics.clusters import RESAMPLES, clusters_of, standard_error, studentised
from probes.statistics.paired import student_quantile, student_two_sided


class Member(NamedTuple):
    """The mean of one figure of a family, its own 95 % interval, and its p-value corrected for the family's size.

    The interval and the p-value are None for a single item, which says nothing of how others would vary.
    """

    mean: float
    low: float | None
    high: float | None
    p_adjusted: float | None


def family(values: Tensor, beyond: Tensor | None = None, *, seed: int = 0) -> list[Member]:
    """The mean of each column of `values` [items, figures], tested against 0, or being no farther from 0 than `beyond`.

    Intervals are of the symmetric studentised bootstrap (Hall 1988), no narrower than Student's, since resamples of a
    few items vary too little. The p-values are those of the step-down maximum of the same resamples (Westfall & Young
    1993; Romano & Wolf 2005): the chance of any false finding among the figures is as stated. In simulations of 100
    figures of 40 items without an effect it is 2 to 8 %, also of skewed figures (exponential), for which Student's t
    with Holm's correction has 40 %.
    """
    items, figures = values.shape
    means = values.double().mean(0)
    if items < 2:
        return [Member(mean, None, None, None) for mean in means.tolist()]
    distances = (means.abs() - (0 if beyond is None else beyond.double())).clamp_min(0)
    reach = torch.zeros(RESAMPLES, figures, dtype=torch.float64)
    statistics = torch.zeros(figures, dtype=torch.float64)
    halves = [0.0] * figures
    for index, column in enumerate(values.double().T):
        clusters = clusters_of(column)
        error = standard_error(clusters)
        # Where all items have the same value there is nothing to resample, and rounding is no variation.
        if error <= 1e-12 * max(1.0, abs(float(means[index]))):
            statistics[index] = math.inf if float(distances[index]) > 1e-12 else 0.0
            continue
        reach[:, index] = studentised(clusters, seed).abs()
        statistics[index] = distances[index] / error
        halves[index] = error * max(
            float(reach[:, index].quantile(CONFIDENCE)), student_quantile(CONFIDENCE, items - 1)
        )
    # As of a single difference: no smaller than Student's, since resamples hold few values where few items differ.
    alone = [student_two_sided(each, items - 1) for each in statistics.tolist()]
    adjusted = step_down(statistics, reach).tolist()
    return [
        Member(mean, mean - half, mean + half, max(p, q))
        for mean, half, p, q in zip(means.tolist(), halves, adjusted, alone, strict=True)
    ]


def step_down(statistics: Tensor, resampled: Tensor) -> Tensor:
    """Adjusted p-values of `statistics` [figures], by what they are without an effect, `resampled` [draws, figures].

    The greatest statistic is compared with the greatest of all figures in each draw, the next with the greatest of the
    figures but the first, and so on (Westfall & Young 1993, algorithm 2.8).
    """
    order = statistics.argsort(descending=True, stable=True)
    greatest = resampled[:, order].flip(1).cummax(1).values.flip(1)
    # Up to rounding, which must not decide whether a draw counts as one that reaches the statistic.
    count = (greatest >= statistics[order] * (1 - 1e-9)).sum(0)
    adjusted = torch.empty_like(statistics)
    adjusted[order] = ((1 + count) / (1 + len(resampled))).to(statistics).cummax(0).values
    return adjusted
