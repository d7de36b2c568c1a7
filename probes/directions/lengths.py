"""Classes of different length: noticing them, and matching the tokens that count.

An average over few tokens near the beginning differs from one over many, whatever the texts say, so a direction between
classes of different length is in part one of length.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch

from probes.intervals import auroc
from probes.models.tokens import Tokens
from vectors.errors import ExampleError, UsageError

MATCHES = ("length", "position")
SEPARATING = 0.9  # AUROC of the length alone from which on the classes count as different
RATIO = 1.25  # of the median lengths: smaller differences hardly move an average


def problem_of_lengths(tokenised: Sequence[Tokens], positive: int) -> str:
    """A sentence with figures where the length alone tells the classes apart, else an empty text.

    The first `positive` examples are the positive ones.
    """
    counts = [len(each.counted) for each in tokenised]
    positives, negatives = counts[:positive], counts[positive:]
    low, high = sorted((median(positives), median(negatives)))
    separation = auroc(torch.tensor(positives, dtype=torch.float64), torch.tensor(negatives, dtype=torch.float64))
    separation = max(separation, 1 - separation)
    if separation < SEPARATING or high < RATIO * low:
        return ""
    return (
        f"the classes differ in length: positive examples have {median(positives):g} tokens that count in the median, "
        f"negative ones {median(negatives):g} (AUROC of the length alone: {separation:.2f}), so the vector may be one "
        "of length"
    )


def matched(tokenised: Sequence[Tokens], positive: int, paired: bool, match: str) -> list[Tokens]:
    """The examples, each with its counted tokens reduced to those that its counterpart in the other class has too.

    The counterpart is the other of a pair, or else the example of the other class with the same rank in length.
    `length` keeps the first tokens, as many as the shorter of the two has; `position` keeps the positions in the
    sequence that both have. Raises UsageError for another `match`, ExampleError where nothing is left.
    """
    if match not in MATCHES:
        raise UsageError(f"there is no match {match!r}", f"use --match {' or '.join(MATCHES)}")
    partners = _counterparts([len(each.counted) for each in tokenised], positive, paired)
    cut, empty = [], []
    for each, partner in zip(tokenised, partners, strict=True):
        other = tokenised[partner].counted
        counted = each.counted[: len(other)] if match == "length" else sorted({*each.counted} & {*other})
        if not counted:
            empty.append(each.origin)
        cut.append(each._replace(counted=counted))
    if empty:
        raise ExampleError(
            f"{len(empty)} of {len(cut)} examples share no position with their counterpart (the first: {empty[0]})",
            "use --match length, or prompts of the same length in both classes",
        )
    return cut


def _counterparts(counts: Sequence[int], positive: int, paired: bool) -> list[int]:
    """The index of each example's counterpart in the other class."""
    positives, negatives = range(positive), range(positive, len(counts))
    if paired:
        return [*negatives, *positives]
    partners = [0] * len(counts)
    for side, opposite in ((positives, negatives), (negatives, positives)):
        ranked, facing = (sorted(part, key=lambda i: counts[i]) for part in (side, opposite))
        for rank, index in enumerate(ranked):
            partners[index] = facing[(2 * rank + 1) * len(facing) // (2 * len(ranked))]
    return partners
