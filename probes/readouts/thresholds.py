"""A threshold for a stated false-positive rate, and the rate that it has on other data.

The threshold is chosen on one part of the negatives: the k-th greatest of their n scores, k = floor(rate (n + 1)). A
further negative exceeds it with probability at most k / (n + 1), whatever the distribution of scores (Vovk, Gammerman &
Shafer 2005, split conformal prediction). The rates are measured on the other part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.intervals import CONFIDENCE, RESAMPLES
from probes.seeds import child_seed
from probes.statistics.clusters import clusters_of
from probes.statistics.proportions import proportion
from vectors.errors import ExampleError

DECIMALS = 4  # of a threshold, so that what is printed is what was measured


class Rate(NamedTuple):
    """A rate: `above` of `total`, with its 95 % interval."""

    above: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The rate itself; NaN of nothing."""
        return self.above / self.total if self.total else math.nan


class Threshold(NamedTuple):
    """A threshold in scores: above it is positive. `bound` is the highest expected rate of new negatives above it."""

    value: float
    chosen_on: int
    bound: float

    def probability_of(self, above: int, total: int) -> float:
        """The probability that so many or more of `total` new negatives exceed it, if they are of the same kind.

        Their rate has the distribution Beta(k, n + 1 - k), since any order of the scores is equally likely; so the
        count has a beta-binomial distribution.
        """
        n = self.chosen_on
        k = round(self.bound * (n + 1))

        def log_beta(a: float, b: float) -> float:
            return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

        logs = (
            math.lgamma(total + 1) - math.lgamma(i + 1) - math.lgamma(total - i + 1)
            + log_beta(i + k, total - i + n + 1 - k) - log_beta(k, n + 1 - k)
            for i in range(above, total + 1)
        )  # fmt: skip
        return min(1.0, math.fsum(math.exp(each) for each in logs))


def require_enough(count: int, rate: float) -> None:
    """Refuse negatives that are too few to choose a threshold for so small a rate. Raises ExampleError."""
    if _above(count, rate) < 1:
        least, needed = math.ceil(1000 / (count + 1)) / 1000, math.ceil(1 / rate - 1e-9) - 1
        raise ExampleError(
            f"{count} negatives to choose the threshold on are too few for a false-positive rate of {rate:g}: "
            f"with {count}, the least is {least:g}",
            f"about half of the negatives choose it, by a hash of each, and must be {needed}: "
            f"give more, or --fpr {least:g}",
        )


def _above(count: int, rate: float) -> int:
    """How many of the scores that choose may lie at the threshold or above."""
    return math.floor(rate * (count + 1) + 1e-9)


def threshold_for(negative: Tensor, rate: float) -> Threshold:
    """The threshold for a false-positive rate in (0, 1), from scores of negatives [n].

    Raises ExampleError where there are too few negatives for so small a rate.
    """
    count = len(negative)
    require_enough(count, rate)
    above = _above(count, rate)
    value = float(negative.double().sort(descending=True).values[above - 1])
    value = math.ceil(value * 10**DECIMALS) / 10**DECIMALS  # upwards, which lets no further negative pass
    return Threshold(value, count, above / (count + 1))


def rate_above(scores: Tensor, threshold: float, groups: Sequence[str] | None = None) -> Rate:
    """The share of scores above a threshold, with the exact interval of Clopper & Pearson (1934).

    Where scores share groups, the interval is Wilson's, in which they count as fewer (`proportions.proportion`).
    """
    above = scores > threshold
    count, total = int(above.sum()), len(scores)
    if groups is not None and len(set(groups)) < total:
        _, low, high = proportion(above.double(), groups)
    else:
        low, high = clopper_pearson(count, total)
    return Rate(count, total, low, high)


def rate_of_tokens_above(
    texts: Sequence[Tensor], threshold: float, seed: int, groups: Sequence[str] | None = None
) -> Rate:
    """The share of all tokens' scores above a threshold; `texts` are the scores of each text's tokens.

    The interval is a bootstrap over texts, or over groups of them, since the tokens of a text are alike; of a rate of 0
    or 1, which has no width in any resample, it is the exact one for as many texts or groups.
    """
    names = [str(index) for index in range(len(texts))] if groups is None else groups
    above = torch.tensor([float((scores > threshold).sum()) for scores in texts], dtype=torch.float64)
    sizes = clusters_of(torch.tensor([float(len(scores)) for scores in texts]), names).sums
    counts = clusters_of(above, names).sums
    count, total, clusters = int(counts.sum()), int(sizes.sum()), len(sizes)
    if count in (0, total):
        low, high = clopper_pearson(0 if count == 0 else clusters, clusters)
        return Rate(count, total, low, high)
    generator = torch.Generator().manual_seed(child_seed(seed, "bootstrap of texts"))
    drawn = torch.randint(clusters, (RESAMPLES, clusters), generator=generator)
    rates = counts[drawn].sum(1) / sizes[drawn].sum(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(rates, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Rate(count, total, low, high)


def clopper_pearson(count: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact interval of a binomial share: `count` of `total`. (0, 1) of nothing."""
    tail = (1 - confidence) / 2
    if total == 0:
        return 0.0, 1.0
    low = 0.0 if count == 0 else _root(lambda p: 1 - _cumulative(count - 1, total, p) - tail)
    high = 1.0 if count == total else _root(lambda p: tail - _cumulative(count, total, p))
    return low, high


def _root(rising: Callable[[float], float]) -> float:
    """Where a function that rises on [0, 1] is 0, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def _cumulative(count: int, total: int, p: float) -> float:
    """P(X <= count) of a binomial distribution."""
    if p in (0.0, 1.0):
        return 1.0 if p == 0.0 or count >= total else 0.0
    logs = (
        math.lgamma(total + 1) - math.lgamma(i + 1) - math.lgamma(total - i + 1)
        + i * math.log(p) + (total - i) * math.log1p(-p)
        for i in range(count + 1)
    )  # fmt: skip
    return min(1.0, math.fsum(math.exp(each) for each in logs))
