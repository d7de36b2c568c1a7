"""Layers as text, such as `3,5,12-15`: written and read, without torch."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from vectors.documents.artifacts import HIGHEST_LAYER
from vectors.errors import UsageError


def spans(layers: Iterable[int]) -> str:
    """Layers as compact text, such as `3,5,12-15`; empty for no layers."""
    runs: list[list[int]] = []
    for i in sorted(set(layers)):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def together(layers: Iterable[int]) -> str:
    """Layers that act together, as `steer sweep --layers` takes them: `12`, the pair `8+12`, the band `8..12`.

    Others are joined, such as `3+8-12`; `8-12` by itself are five layers of which each acts alone.
    """
    group = sorted(set(layers))
    if len(group) > 2 and group[-1] - group[0] == len(group) - 1:
        return f"{group[0]}..{group[-1]}"
    return "+".join(map(str, group)) if len(group) < 3 else spans(group).replace(",", "+")


def layers_given(layers: str | int | Sequence[int]) -> list[int] | None:
    """Layers as a text (`parse_layers`), a number or several, in the order given; None for `all`.

    Raises UsageError.
    """
    if isinstance(layers, str):
        return parse_layers(layers)
    try:
        numbers = [operator.index(i) for i in (layers if isinstance(layers, Iterable) else [layers])]
    except TypeError as error:
        raise UsageError(f"{layers!r} are no layers", 'write "8-15", 12, or [3, 5, 12]') from error
    if not numbers:
        raise UsageError("no layer is given", 'write "8-15", 12, or [3, 5, 12]')
    outside = [i for i in numbers if not 0 <= i <= HIGHEST_LAYER]
    if outside:
        raise UsageError([f"no model has a layer {i}" for i in outside], "layers count from 0")
    return numbers


def parse_layers(text: str) -> list[int] | None:
    """Read layers such as `12`, `8-15` or `3,5,12-15`: sorted, each once; None for `all`.

    Raises UsageError with every part that is invalid.
    """
    if text.strip() == "all":
        return None
    layers: set[int] = set()
    problems, hints = [], []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            problems.append(f"{part.strip()!r} in {text!r} is not a layer or a range of layers")
            hints.append("write all, or layers such as 12, 8-15 or 3,5,12-15")
            continue
        first, last = int(low), int(high or low)
        if last < first:
            problems.append(f"the range {part.strip()} descends")
            hints.append(f"write {last}-{first}")
        elif last > HIGHEST_LAYER:
            problems.append(f"no model has a layer {last}")
            hints.append("layers count from 0")
        else:
            layers.update(range(first, last + 1))
    if problems:
        raise UsageError(problems, "; ".join(dict.fromkeys(hints)))
    return sorted(layers)
