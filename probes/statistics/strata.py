"""Items whose answers come from one short list (yes or no) are averaged answer by answer.

What steers towards "Yes" whatever is asked raises the figure of each item whose positive answer is "Yes", and lowers
that of each whose positive answer is "No". Of 64 statements drawn from a balanced list the two differ by 8 or so, which
turns such a preference, often twenty times the effect on the behaviour, into an apparent effect. With equal weights for
the answers it cancels (poststratification: Cochran 1977, Sampling Techniques, section 5A.9).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

FEWEST = 5  # items of an answer, below which its mean is too uncertain to count as much as another's


def balanced(values: Tensor, strata: Sequence[str] | None) -> Tensor:
    """Values [..., items] whose plain mean is the mean of the strata's means, float64 of the same shape.

    The map is linear, so differences of arms may be taken before or after it. Within a stratum the values' distances
    from their mean are scaled such that the standard error of the plain mean of the result is that of the mean of the
    strata's means, sqrt(sum of s^2/n over the strata) / (number of strata). `strata` None changes nothing.
    """
    import torch  # here, since suites are read without it

    result = values.double()
    if strata is None:
        return result
    columns = _columns(strata)
    mean = torch.stack([result[..., each].mean(-1) for each in columns]).mean(0)
    balanced_values = torch.empty_like(result)
    for each in columns:
        count = len(each)
        scale = len(strata) / (count * len(columns)) * (count / (count - 1)) ** 0.5
        inside = result[..., each]
        balanced_values[..., each] = mean[..., None] + scale * (inside - inside.mean(-1, keepdim=True))
    return balanced_values


def answer_strata(positive: Sequence[str], negative: Sequence[Sequence[str]]) -> list[str] | None:
    """The stratum of each item, which is its positive answer; None where answers need no balance.

    `positive` has the positive answer of each item, `negative` its other answers. Items are balanced if all have the
    same answers in one order or another, at least two of them are the positive one of some item, and each of those of
    at least `FEWEST` items.
    """
    answers = {frozenset([one, *others]) for one, others in zip(positive, negative, strict=True)}
    return list(positive) if len(answers) == 1 and are_balanced(positive) else None


def are_balanced(strata: Sequence[str]) -> bool:
    """Whether there are at least two strata, each with at least `FEWEST` items."""
    counts = [strata.count(each) for each in set(strata)]
    return len(counts) > 1 and min(counts) >= FEWEST


def by_stratum(values: Tensor, strata: Sequence[str]) -> dict[str, float]:
    """The mean of values [items] in each stratum."""
    return {strata[each[0]]: float(values.double()[each].mean()) for each in _columns(strata)}


def _columns(strata: Sequence[str]) -> list[list[int]]:
    return [[i for i, name in enumerate(strata) if name == each] for each in sorted(set(strata))]
