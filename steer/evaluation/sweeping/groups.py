"""The layers of a sweep as text: `auto`, `all`, or single layers, pairs and bands such as `8-20`, `10+14`, `8..12`."""

from __future__ import annotations

from collections.abc import Sequence

from vectors.errors import SteerError, UsageError, collecting, raise_together
from vectors.registry.layers import parse_layers, spans

AUTO = "auto"


def parse_groups(text: str) -> list[tuple[int, ...]] | None:
    """The groups of layers that act together, each once, in order; None for `auto` and `all`. Raises UsageError."""
    if text.strip() in (AUTO, "all"):
        return None
    groups: list[tuple[int, ...]] = []
    errors: list[SteerError] = []
    for part in (each.strip() for each in text.split(",")):
        with collecting(errors):
            if "+" in part:
                groups.append(tuple(sorted({layer for each in part.split("+") for layer in _layers(each)})))
            elif ".." in part:
                groups.append(_band(part))
            else:
                groups += [(layer,) for layer in _layers(part)]
    raise_together(errors)
    return list(dict.fromkeys(groups))


def _band(text: str) -> tuple[int, ...]:
    """The layers of a band such as `8..12`. Raises UsageError."""
    low, _, high = (each.strip() for each in text.partition(".."))
    if not (low.isdecimal() and high.isdecimal()):
        raise UsageError(f"{text!r} is not a band of layers", "write a band such as 8..12")
    if int(high) < int(low):
        raise UsageError(f"the band {text} descends", f"write {high}..{low}")
    return tuple(_layers(f"{low}-{high}"))


def _layers(text: str) -> list[int]:
    layers = parse_layers(text)
    if layers is None:
        raise UsageError("`all` stands alone", "write all, or layers such as 8-20, 10+14 or 8..12")
    return layers


def problems_of_groups(groups: Sequence[tuple[int, ...]], available: Sequence[int]) -> list[str]:
    """A problem where groups name layers that there are no directions for."""
    missing = sorted({layer for group in groups for layer in group} - set(available))
    return [f"there is no direction at layer {spans(missing)}; there are {spans(available)}"] if missing else []
