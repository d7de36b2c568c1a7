"""Streaming statistics: count, mean and, if a method needs it, the centred second moment; merged in any order.

Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", eqs. 2.1: centred sums are merged, so a
large common offset of the activations costs no precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from probes.capture.spill import Layer

CHUNK = 2**21  # values that are in float64 at a time: 16 MiB
# What an extraction method gets: the classes' means; their second moments; the second moments of the paired
# differences (or of both classes, where there are no pairs); or the rows themselves.
Needs = Literal["means", "second moments", "pair moments", "activations"]
Rows = Tensor | Layer  # [n, hidden], in memory or read piece by piece


@dataclass(frozen=True)
class Moments:
    """Of `count` rows: `mean` [hidden] and `scatter` [hidden, hidden], the sum of (x - mean)(x - mean)^T; float64."""

    count: int
    mean: Tensor
    scatter: Tensor | None = None

    @staticmethod
    def of(rows: Tensor, second: bool = False) -> Moments:
        """The moments of rows [n, hidden], n > 0."""
        rows = rows.double()
        mean = rows.mean(0)
        if not second:
            return Moments(len(rows), mean)
        centred = rows - mean
        return Moments(len(rows), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of rows together."""
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        if self.scatter is None or other.scatter is None:
            return Moments(count, mean)
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)


def merged(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together. Raises ValueError for none."""
    total: Moments | None = None
    for part in parts:
        total = part if total is None else total.merge(part)
    if total is None:
        raise ValueError("there are no moments to merge")
    return total


@dataclass(frozen=True)
class Evidence:
    """What an extraction method gets of one layer: the moments of the two classes and, where it needs them, more.

    `differences` are the moments of the paired differences positive - negative, None when the examples are no pairs.
    `activations` are the rows themselves, ([n, hidden], [m, hidden]), only for a method that needs "activations".
    """

    positive: Moments
    negative: Moments
    differences: Moments | None = None
    activations: tuple[Tensor, Tensor] | None = None

    @property
    def displacement(self) -> Tensor:
        """mean(positive) - mean(negative), float64 [hidden]."""
        return self.positive.mean - self.negative.mean


def piece(rows: Rows, start: int, stop: int) -> Tensor:
    """Rows [start, stop), float64 [stop - start, hidden]; read from disk if they are there."""
    return (rows[start:stop] if isinstance(rows, Tensor) else rows.rows(start, stop)).double()


def pieces(count: int, hidden: int) -> Iterator[tuple[int, int]]:
    """Where to cut `count` rows, so that no more than `CHUNK` values are in memory at a time."""
    step = max(1, CHUNK // hidden)
    return ((start, min(start + step, count)) for start in range(0, count, step))


def evidence_of(needs: Needs, rows: Rows, labels: Tensor, paired: bool) -> Evidence:
    """The evidence for a method that needs `needs`, from rows [n, hidden] with labels bool [n].

    If `paired`, the positives come first, then as many negatives: positive i and negative i are a pair.
    """
    (evidence,) = evidence_by_fold(needs, rows, labels, torch.zeros(len(labels), dtype=torch.int64), paired)
    return evidence


def evidence_by_fold(needs: Needs, rows: Rows, labels: Tensor, fold: Tensor, paired: bool) -> list[Evidence]:
    """`evidence_of` each fold; `fold` int64 [n] numbers them from 0, and each holds both classes.

    The rows are read piece by piece, unless the method needs all of them. If `paired`, both sides of each pair must lie
    in the same fold.
    """
    count = int(fold.max()) + 1
    if needs == "activations":
        all_rows = piece(rows, 0, len(labels))
        sides = [[all_rows[(fold == f) & which] for which in (labels, ~labels)] for f in range(count)]
        return [Evidence(Moments.of(p), Moments.of(n), None, (p, n)) for p, n in sides]
    paired = paired and needs == "pair moments"
    if needs == "means" or paired:
        parts = _means(rows, 2 * fold + labels, 2 * count)
    else:
        parts = _moments(rows, 2 * fold + labels, 2 * count)
    differences = _differences(rows, fold[: len(labels) // 2], count) if paired else [None] * count
    return [Evidence(parts[2 * f + 1], parts[2 * f], differences[f]) for f in range(count)]


def evidence_of_others(needs: Needs, rows: Rows, labels: Tensor, fold: Tensor, paired: bool) -> list[Evidence]:
    """For each fold the evidence of all the other folds together; the arguments are those of `evidence_by_fold`."""
    count = int(fold.max()) + 1
    if needs == "activations":
        all_rows = piece(rows, 0, len(labels))
        return [evidence_of(needs, all_rows[fold != f], labels[fold != f], paired) for f in range(count)]
    if needs == "means":  # of which no more than the sums are needed
        sizes, sums = _sums(rows, 2 * fold + labels, 2 * count)
        sizes, sums = sizes.view(count, 2), sums.view(count, 2, -1)
        remaining = sizes.sum(0) - sizes
        means = (sums.sum(0) - sums) / remaining[:, :, None]
        return [
            Evidence(Moments(m, positive), Moments(n, negative))
            for (n, m), (negative, positive) in zip(remaining.tolist(), means, strict=True)
        ]
    parts = evidence_by_fold(needs, rows, labels, fold, paired)
    return [_together([part for other, part in enumerate(parts) if other != f]) for f in range(count)]


def _together(parts: Sequence[Evidence]) -> Evidence:
    pairs = [part.differences for part in parts if part.differences is not None]
    return Evidence(
        merged(part.positive for part in parts),
        merged(part.negative for part in parts),
        merged(pairs) if pairs else None,
    )


def _sums(rows: Rows, group: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The size int64 [count] and the sum float64 [count, hidden] of each group of rows."""
    sums = torch.zeros(count, rows.shape[1], dtype=torch.float64)
    for start, stop in pieces(len(group), rows.shape[1]):
        sums.index_add_(0, group[start:stop], piece(rows, start, stop))
    return torch.bincount(group, minlength=count), sums


def _means(rows: Rows, group: Tensor, count: int) -> list[Moments]:
    """The counts and means of each group of rows."""
    sizes, sums = _sums(rows, group, count)
    return [Moments(size, total / size) for size, total in zip(sizes.tolist(), sums, strict=True)]


def _moments(rows: Rows, group: Tensor, count: int) -> list[Moments]:
    """The first and second moments of each group of rows."""
    cuts = pieces(len(group), rows.shape[1])
    return _merged_by_group(((piece(rows, *cut), group[slice(*cut)]) for cut in cuts), count)


def _differences(rows: Rows, fold: Tensor, count: int) -> list[Moments]:
    """The moments of positive i less negative i in each fold; the negatives follow the positives."""
    half = len(fold)
    cuts = pieces(half, 2 * rows.shape[1])
    return _merged_by_group(
        ((piece(rows, a, b) - piece(rows, half + a, half + b), fold[a:b]) for a, b in cuts),
        count,
    )


def _merged_by_group(parts: Iterable[tuple[Tensor, Tensor]], count: int) -> list[Moments]:
    totals: list[Moments | None] = [None] * count
    for rows, group in parts:
        for g in group.unique().tolist():
            part, before = Moments.of(rows[group == g], True), totals[g]
            totals[g] = part if before is None else before.merge(part)
    return [moments for moments in totals if moments is not None]
