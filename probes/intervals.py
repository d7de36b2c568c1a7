"""Effect sizes of two classes of scores, and their uncertainty: AUROC, its bootstrap interval, Cohen's d."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.seeds import child_seed

RESAMPLES = 1000
CONFIDENCE = 0.95


def auroc(positive: Tensor, negative: Tensor) -> float:
    """The probability that a positive scores above a negative, ties counted half (Mann-Whitney U / nm).

    The scores are [n] and [m].
    """
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive, right=False)
    equal_or_below = torch.searchsorted(ordered, positive, right=True)
    return float((below + equal_or_below).double().mean()) / (2 * len(negative))


def cohens_d(positive: Tensor, negative: Tensor) -> float:
    """The difference of the means in units of the pooled standard deviation (Cohen 1988, eq. 2.5.2); 0 if that is 0."""
    n, m = len(positive), len(negative)
    difference = positive.mean() - negative.mean()
    squares = (positive - positive.mean()).square().sum() + (negative - negative.mean()).square().sum()
    pooled = (squares / max(n + m - 2, 1)).sqrt()
    if float(pooled) == 0.0:
        return 0.0
    return float(difference / pooled)


def draw_resamples(labels: Tensor, seed: int, groups: Sequence[str] = ()) -> Tensor:
    """Bootstrap counts, int16 [RESAMPLES, n]: how often each example is drawn; each class is resampled by itself.

    If some examples have a group, whole groups are drawn, of both classes, and examples without one are groups of their
    own; a draw that lacks a class is left out, so there may be fewer rows.
    """
    generator = torch.Generator().manual_seed(child_seed(seed, "bootstrap"))
    if any(groups):
        numbers: dict[str | int, int] = {}
        cluster = torch.tensor([numbers.setdefault(g or i, len(numbers)) for i, g in enumerate(groups)])
        drawn = torch.randint(len(numbers), (RESAMPLES, len(numbers)), generator=generator)
        times = torch.zeros(RESAMPLES, len(numbers), dtype=torch.int16)
        times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.int16))
        counts = times[:, cluster]
        return counts[(counts[:, labels].sum(1) > 0) & (counts[:, ~labels].sum(1) > 0)]
    counts = torch.zeros(RESAMPLES, len(labels), dtype=torch.int16)
    for which in (labels, ~labels):
        indices = which.nonzero()[:, 0]
        size = len(indices)
        for part in counts.split(max(1, 2**20 // size)):  # all draws at once would be the largest thing in memory
            drawn = torch.randint(size, (len(part), size), generator=generator)
            drawn += size * torch.arange(len(part))[:, None]
            part[:, indices] = torch.bincount(drawn.flatten(), minlength=part.shape[0] * size).view(-1, size).short()
    return counts


def interval(scores: Tensor, labels: Tensor, counts: Tensor) -> tuple[float, float]:
    """The percentile bootstrap interval of the AUROC (Efron 1981): its lower and upper end.

    `scores` [n], `labels` bool [n], `counts` int16 [RESAMPLES, n] from `draw_resamples`. The scores are sorted once: a
    resample only changes their weights, so each costs one cumulative sum.
    """
    positive, negative = labels.nonzero()[:, 0], (~labels).nonzero()[:, 0]
    ordered, order = scores[negative].sort()
    first = torch.searchsorted(ordered, scores[positive], right=False)
    last = torch.searchsorted(ordered, scores[positive], right=True)
    values = []
    for part in counts.split(max(1, 2**20 // len(scores))):
        # Exact in float64: sums of whole numbers.
        below = torch.zeros(len(part), len(negative) + 1, dtype=torch.float64)
        torch.cumsum(part.index_select(1, negative[order]), 1, dtype=torch.float64, out=below[:, 1:])
        twice = below.index_select(1, first) + below.index_select(1, last)
        drawn = [part.index_select(1, side).sum(1) for side in (positive, negative)]
        values.append((twice * part.index_select(1, positive)).sum(1) / 2 / drawn[0] / drawn[1])
    every = torch.cat(values)
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(every, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def supported(scores: Tensor, labels: Tensor, counts: Tensor, groups: Sequence[str] = ()) -> tuple[float, float]:
    """`interval`, no narrower than so many examples of each class allow (`provable`); `groups` are those of all
    examples, as `draw_resamples` takes them, and count as one example each."""
    low, high = interval(scores, labels, counts)
    names = [group or i for i, group in enumerate(groups or [""] * len(labels))]
    positive, negative = ({names[i] for i in side.nonzero()[:, 0].tolist()} for side in (labels, ~labels))
    least, greatest = provable(len(positive), len(negative))
    return min(low, greatest), max(high, least)


def provable(positive: int, negative: int) -> tuple[float, float]:
    """The lowest upper and the highest lower bound on an AUROC that so many independent examples can support, at 95 %
    confidence.

    If a sample's classes are perfectly separated, every bootstrap resample gives the same AUROC: the interval has no
    width, however few the examples. But if a share p of the rarer class lies on the wrong side, none of its k examples
    does with probability (1 - p)^k. So the exact lower bound is tail^(1 / k), whatever the distributions (Clopper &
    Pearson 1934, k successes of k; tail is half of 1 - CONFIDENCE), and no other sample supports a higher one. The
    upper bound is its mirror image.
    """
    greatest = ((1 - CONFIDENCE) / 2) ** (1 / min(positive, negative))
    return 1 - greatest, greatest
