"""Options that several merge methods share, with the same name, range and meaning."""

from __future__ import annotations

from vectors.registry.options import Option


def weight(default: float = 1.0) -> Option:
    """The option `weight`, of each input."""
    return Option("weight", default, "the weight of this input", each=True)


def density(default: float = 0.2) -> Option:
    """The option `density`, of each input: the share of a delta's elements that trimming or dropping keeps."""
    return Option("density", default, "the share of a delta's elements that is kept", each=True, low=0, high=1)


SCALE = Option("lambda", 1.0, "a factor of the merged delta")
NORMALIZE = Option("normalize", False, "divide by the sum of the weights")
ELECT = Option(
    "elect", "before", "whether signs are elected before or after the deltas are weighted", choices=("before", "after")
)
COMBINE = Option(
    "combine", "mean", "the mean or the sum of the values that agree with the elected sign", choices=("mean", "sum")
)
ZERO = Option(
    "zero",
    "none",
    "the sign that is elected where votes cancel: none (the result is 0) or positive",
    choices=("none", "positive"),
)
