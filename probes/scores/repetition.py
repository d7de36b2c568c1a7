"""How much a completion repeats itself: the share of its 4-grams that occurred before."""

from __future__ import annotations

from collections.abc import Sequence

from probes.scores import Measured, Needs, mean

SUMMARY = "share of the completion's 4-grams of tokens that occurred before in it"
SOURCE = "Welleck et al. 2019 (seq-rep-4), arXiv:1908.04319"
UNIT = "share"
NEEDS: Needs = "completion"
combine = mean


def score(measured: Measured) -> float:
    """0 where nothing repeats, or where there are fewer than four tokens."""
    return repetition(measured.completion.completion_ids)


def repetition(ids: Sequence[int], size: int = 4) -> float:
    """The share of n-grams of `size` ids that occurred before."""
    grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
