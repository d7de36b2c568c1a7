"""Extraction methods: from what was measured at one layer to a direction.

A method is a module of this folder, or one that an outside package names under the entry-point group
`steer.extraction_methods`. It has

- `SUMMARY` and `SOURCE`: one line each, what it is and where it comes from;
- `NEEDS`: "means"; "second moments" (of both classes); "pair moments" (second moments of the paired differences, or of
  both classes where there are no pairs); or "activations" (the rows themselves);
- `direction(evidence) -> Tensor`: float64 [hidden], of any length and sign: `scaled` gives it both.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from probes.directions.evidence import Evidence
from vectors.errors import ExampleError
from vectors.plugins import choose, discover


def methods() -> dict[str, ModuleType]:
    """Every method by name, built-in or of an outside package."""
    return discover("probes.directions.methods", "steer.extraction_methods")


def method(name: str) -> ModuleType:
    """The method called `name`. Raises UsageError."""
    return choose("extraction method", name, methods())


def scaled(direction: Tensor, evidence: Evidence) -> Tensor:
    """The direction of which strength 1 is one mean displacement: u <displacement, u>, u the unit direction.

    Its sign follows the means whatever the sign of `direction`. Raises ExampleError when there is nothing along it.
    """
    length = direction.norm()
    unit = direction / length
    along = evidence.displacement @ unit
    if not bool(torch.isfinite(unit).all()) or float(along.abs()) == 0.0:
        raise ExampleError(
            "the two classes have the same mean activation along the direction, so there is nothing to steer by",
            "check that the two files differ in the behaviour",
        )
    return unit * along
