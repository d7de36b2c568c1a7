"""Judging a direction on examples that it was not made from: AUROC with its interval, Cohen's d, and a floor.

Each fold is scored by the direction of the other folds. A score is the component along the unit direction, counted
from the middle between the two classes' means: directions of different folds differ a little, and along a large common
offset of the activations that little would drown the classes. The floor repeats everything with labels shuffled inside
each fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from probes.data.examples import Example
from probes.directions.evidence import CHUNK, Rows, evidence_of_others, piece, pieces
from probes.directions.methods import scaled
from probes.models.seeds import child_seed
from vectors.errors import ExampleError

FOLDS = 5
RESAMPLES = 1000
CONFIDENCE = 0.95
SHUFFLES = 5


class Judgement(NamedTuple):
    """What was measured on held-out examples at one layer.

    `auroc_low` and `auroc_high` are a 95 % bootstrap interval, no narrower than so few examples allow (`provable`);
    `auroc_shuffled` and `cohens_d_shuffled` are means over shuffled labels: what nothing looks like.
    """

    auroc: float
    auroc_low: float
    auroc_high: float
    auroc_shuffled: float
    cohens_d: float
    cohens_d_shuffled: float


class Draws(NamedTuple):
    """What chance decides: bootstrap counts, int16 [RESAMPLES, n], and labels shuffled inside each fold, bool [n]."""

    resamples: Tensor
    shuffled: list[Tensor]


def folds(
    positive: Sequence[Example], negative: Sequence[Example], seed: int, paired: bool = False
) -> tuple[Tensor, Tensor]:
    """The fold of each example, int64 [n] and [m], balanced within each class.

    Examples with the same context (or, without one, the same text) are never on both sides of a split, as long as there
    are as many contexts as folds; nor, where they are `paired`, are the two of a pair. A fold follows from an example's
    content, not from its place in the file.
    """
    count = min(FOLDS, len(positive), len(negative))
    both, half = (*positive, *negative), len(positive)
    contexts = [e.context for e in both]
    texts = [(e.context, e.completion) for e in both]
    attempts: list[Sequence[object]] = [contexts] if None not in contexts and len(set(contexts)) >= count else []
    attempts.append(texts)  # a few large groups: better a split by example than a fold of one class
    for keys in attempts:
        found = _balanced(_groups(keys, half, seed, paired), half, count)
        if found is not None:
            return found
    if paired:  # texts that many pairs share make large groups too
        pairs = list(zip(texts[:half], texts[half:], strict=True))
        found = _balanced(_groups([*pairs, *pairs], half, seed, False), half, count)
        if found is not None:
            return found
    # Nothing but repetitions of a few examples: no split is honest, this one at least is even.
    return torch.arange(half) % count, torch.arange(len(negative)) % count


def _groups(keys: Sequence[object], half: int, seed: int, paired: bool) -> list[int]:
    """The group of each example, by a number that follows from content: equal keys, and the two of a pair, together."""
    numbers = {key: child_seed(seed, "fold", key) for key in set(keys)}
    found = [numbers[key] for key in keys]
    if not paired:
        return found
    leader = {number: number for number in found}

    def lead(number: int) -> int:
        while leader[number] != number:
            number = leader[number] = leader[leader[number]]
        return number

    for a, b in zip(found[:half], found[half:], strict=True):
        low, high = sorted((lead(a), lead(b)))
        leader[high] = low
    return [lead(number) for number in found]


def _balanced(groups: Sequence[int], half: int, count: int) -> tuple[Tensor, Tensor] | None:
    """Whole groups dealt to `count` folds, balanced within each class; None when a fold would lack a class."""
    sizes = {g: [0, 0] for g in sorted(set(groups))}
    for index, g in enumerate(groups):
        sizes[g][index >= half] += 1
    filled = [[0, 0] for _ in range(count)]
    chosen: dict[int, int] = {}
    for g in sorted(sizes, key=lambda g: -sum(sizes[g])):  # large groups first, so that the small ones can level
        n, m = sizes[g]
        best = min(range(count), key=lambda f: (filled[f][0] if n else 0) + (filled[f][1] if m else 0))
        filled[best][0] += n
        filled[best][1] += m
        chosen[g] = best
    if any(0 in sides for sides in filled):
        return None
    found = torch.tensor([chosen[g] for g in groups])
    return found[:half], found[half:]


def judge(method: ModuleType, rows: Rows, labels: Tensor, fold: Tensor, draws: Draws, *, paired: bool) -> Judgement:
    """Judge a method at one layer. rows [n, hidden], labels bool [n], fold int64 [n], and what `draw` made of the two.

    All NaN when there is one fold only.
    """
    if int(fold.max()) == 0:
        return Judgement(*[float("nan")] * 6)  # one example of a class can't be held out
    if method.NEEDS == "activations" or len(labels) * rows.shape[1] <= CHUNK:
        rows = piece(rows, 0, len(labels))  # once, for all that follows
    scores = held_out_scores(method, rows, labels, fold, paired=paired)
    low, high = interval(scores, labels, draws.resamples)
    least, greatest = provable(int(labels.sum()), int((~labels).sum()))
    low, high = min(low, greatest), max(high, least)
    shuffled_auroc, shuffled_d = [], []
    for shuffled in draws.shuffled[: 1 if method.NEEDS == "activations" else SHUFFLES]:
        # Shuffling breaks the pairs too.
        floor = held_out_scores(method, rows, shuffled, fold, paired=False)
        shuffled_auroc.append(auroc(floor[shuffled], floor[~shuffled]))
        shuffled_d.append(cohens_d(floor[shuffled], floor[~shuffled]))
    return Judgement(
        auroc(scores[labels], scores[~labels]),
        low,
        high,
        sum(shuffled_auroc) / len(shuffled_auroc),
        cohens_d(scores[labels], scores[~labels]),
        sum(shuffled_d) / len(shuffled_d),
    )


def held_out_scores(method: ModuleType, rows: Rows, labels: Tensor, fold: Tensor, *, paired: bool) -> Tensor:
    """The score of every row, float64 [n], along the direction of the folds that it is not in."""
    others = evidence_of_others(method, rows, labels, fold, paired)
    units = torch.empty(len(others), rows.shape[1], dtype=torch.float64)
    middles = torch.empty(len(others), dtype=torch.float64)
    for held_out, evidence in enumerate(others):
        middle = (evidence.positive.mean + evidence.negative.mean) / 2
        try:
            direction = scaled(method.direction(evidence), evidence)
        except ExampleError:
            direction = torch.zeros_like(middle)  # nothing tells the classes apart: every score is the same
        units[held_out] = direction / direction.norm().clamp_min(torch.finfo(torch.float64).tiny)
        middles[held_out] = middle @ units[held_out]
    scores = torch.empty(len(labels), dtype=torch.float64)
    for start, stop in pieces(len(labels), rows.shape[1]):
        own = fold[start:stop]
        scores[start:stop] = (piece(rows, start, stop) @ units.T).gather(1, own[:, None])[:, 0] - middles[own]
    return scores


def shuffle_within(labels: Tensor, fold: Tensor, seed: int) -> Tensor:
    """The labels permuted inside each fold, so that every fold keeps its number of positives."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = labels.clone()
    for f in range(int(fold.max()) + 1):
        inside = (fold == f).nonzero()[:, 0]
        shuffled[inside] = labels[inside[torch.randperm(len(inside), generator=generator)]]
    return shuffled


def auroc(positive: Tensor, negative: Tensor) -> float:
    """The probability that a positive scores above a negative, ties counted half (Mann-Whitney U / nm)."""
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive, right=False)
    equal_or_below = torch.searchsorted(ordered, positive, right=True)
    return float((below + equal_or_below).double().mean()) / (2 * len(negative))


def cohens_d(positive: Tensor, negative: Tensor) -> float:
    """The difference of the means in units of the pooled standard deviation (Cohen 1988, eq. 2.5.2)."""
    n, m = len(positive), len(negative)
    difference = positive.mean() - negative.mean()
    squares = (positive - positive.mean()).square().sum() + (negative - negative.mean()).square().sum()
    pooled = (squares / max(n + m - 2, 1)).sqrt()
    if float(pooled) == 0.0:
        return 0.0
    return float(difference / pooled)


def draw(labels: Tensor, fold: Tensor, seed: int) -> Draws:
    """The resamples and the shuffles. They serve every layer, so that layers are compared on the same ones."""
    shuffled = [shuffle_within(labels, fold, child_seed(seed, "shuffle", repeat)) for repeat in range(SHUFFLES)]
    return Draws(draw_resamples(labels, seed), shuffled)


def draw_resamples(labels: Tensor, seed: int) -> Tensor:
    """Bootstrap counts, int16 [RESAMPLES, n]: how often each example is drawn, classes apart."""
    generator = torch.Generator().manual_seed(child_seed(seed, "bootstrap"))
    counts = torch.zeros(RESAMPLES, len(labels), dtype=torch.int16)
    for which in (labels, ~labels):
        indices = which.nonzero()[:, 0]
        size = len(indices)
        for some in counts.split(max(1, 2**20 // size)):  # all draws at once would be the largest thing in memory
            drawn = torch.randint(size, (len(some), size), generator=generator)
            drawn += size * torch.arange(len(some))[:, None]
            some[:, indices] = torch.bincount(drawn.flatten(), minlength=some.shape[0] * size).view(-1, size).short()
    return counts


def interval(scores: Tensor, labels: Tensor, counts: Tensor) -> tuple[float, float]:
    """The percentile bootstrap interval of the AUROC (Efron 1981), from the counts of `draw_resamples`.

    Sorted once; a resample only changes the weights, so each costs one cumulative sum and no sorting.
    """
    positive, negative = labels.nonzero()[:, 0], (~labels).nonzero()[:, 0]
    ordered, order = scores[negative].sort()
    first = torch.searchsorted(ordered, scores[positive], right=False)
    last = torch.searchsorted(ordered, scores[positive], right=True)
    values = []
    for some in counts.split(max(1, 2**20 // len(scores))):
        # Exact in float64: sums of whole numbers.
        below = torch.zeros(len(some), len(negative) + 1, dtype=torch.float64)
        torch.cumsum(some.index_select(1, negative[order]), 1, dtype=torch.float64, out=below[:, 1:])
        twice = below.index_select(1, first) + below.index_select(1, last)
        values.append((twice * some.index_select(1, positive)).sum(1) / 2)
    every = torch.cat(values) / len(positive) / len(negative)  # a resample keeps the classes' sizes
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(every, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def provable(positive: int, negative: int) -> tuple[float, float]:
    """The least upper and the greatest lower bound of an AUROC that so many examples can give, at 95 % confidence.

    The bootstrap of perfectly separated classes is a single point, as if nothing were unknown. But where a share p of
    the rarer class lies on the wrong side, none of k examples does with probability (1 - p)^k. So the exact bound of
    separated classes, whatever their distributions, is tail^(1 / k) (Clopper & Pearson 1934, k successes of k), and no
    other outcome shows more.
    """
    greatest = ((1 - CONFIDENCE) / 2) ** (1 / min(positive, negative))
    return 1 - greatest, greatest
