"""Methods of fitting a linear readout to what was measured at one layer, one per file.

A method is a module of this folder, or one that an outside package names under the entry-point group
`steer.probe_methods`, with the names of `ReadoutMethod`. Its scores need no particular scale: they are calibrated
afterwards (`probes.readouts.calibration`).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from probes.directions.evidence import Evidence, Needs
from vectors.registry.plugins import choose, discover_as

GROUP = "steer.probe_methods"


class ReadoutMethod(Protocol):
    """What a method's module holds."""

    SUMMARY: str  # one line: what it is
    SOURCE: str  # where it comes from: a paper
    NEEDS: Needs  # what `evidence` must hold; `probes.directions.evidence` says what each is

    def readout(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """The weight w, float64 [hidden], and the bias b, float64 []: w h + b is above 0 for a positive h."""


def methods() -> dict[str, ReadoutMethod]:
    """Every method by name, built-in or of an outside package. Raises UsageError for a module that lacks a name."""
    return discover_as(ReadoutMethod, "probe method", __name__, GROUP)


def method(name: str) -> ReadoutMethod:
    """The method called `name`. Raises UsageError."""
    return choose("probe method", name, methods())


def between_the_means(weight: Tensor, evidence: Evidence) -> Tensor:
    """The bias that puts the boundary halfway between the two classes' mean scores."""
    return -weight @ (evidence.positive.mean + evidence.negative.mean) / 2
