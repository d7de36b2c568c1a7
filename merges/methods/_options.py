"""The options that several merge methods have: each has one name, one range and one meaning in all of them."""

from __future__ import annotations

from vectors.options import Option


def weight(default: float = 1.0) -> Option:
    """The option of how much of each input is taken."""
    return Option("weight", default, "how much of this input", each=True)


def density(default: float = 0.2) -> Option:
    """The option of which share of each delta is left after trimming."""
    return Option("density", default, "the part of a delta that is kept", each=True, low=0, high=1, open_low=True)


SCALE = Option("lambda", 1.0, "the merged delta is multiplied by this")
NORMALIZE = Option("normalize", False, "divide by the sum of the weights")
ELECT = Option(
    "elect", "before", "whether signs are elected before or after the deltas are weighted", choices=("before", "after")
)
COMBINE = Option(
    "combine", "mean", "the mean of what agrees with the elected sign, or its sum", choices=("mean", "sum")
)
ZERO = Option(
    "zero",
    "none",
    "the sign elected where the votes cancel: none (the result is 0) or positive",
    choices=("none", "positive"),
)
