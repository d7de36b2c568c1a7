"""Extraction methods: from what was measured at one layer to a direction, one method per file.

A method is a module of this folder, or one that an outside package names under the entry-point group
`steer.extraction_methods`, with the names of `ExtractionMethod`.
"""

from __future__ import annotations

from typing import Protocol, get_args

import torch
from torch import Tensor

from probes.directions.evidence import Evidence, Needs
from vectors.errors import ExampleError, UsageError
from vectors.registry.plugins import choose, discover_as

GROUP = "steer.extraction_methods"


class ExtractionMethod(Protocol):
    """What a method's module holds."""

    SUMMARY: str  # one line: what it is
    SOURCE: str  # where it comes from: a paper
    NEEDS: Needs  # what `evidence` must hold; `probes.directions.evidence` says what each is

    def direction(self, evidence: Evidence) -> Tensor:
        """The direction, float64 [hidden], of any length and either sign: `scaled` gives it both."""


def methods() -> dict[str, ExtractionMethod]:
    """Every method by name, built-in or of an outside package. Raises UsageError for a module that lacks a name."""
    modules: dict[str, ExtractionMethod] = discover_as(ExtractionMethod, "extraction method", __name__, GROUP)
    problems = [
        f"the extraction method {name!r} needs {module.NEEDS!r}, not {', '.join(get_args(Needs))}"
        for name, module in modules.items()
        if module.NEEDS not in get_args(Needs)
    ]
    if problems:
        raise UsageError(problems, "update the package that offers it, or uninstall it")
    return modules


def method(name: str) -> ExtractionMethod:
    """The method called `name`. Raises UsageError."""
    return choose("extraction method", name, methods())


def scaled(direction: Tensor, evidence: Evidence) -> Tensor:
    """The direction of which strength 1 is one mean displacement: u <displacement, u>, u the unit direction.

    Both are float64 [hidden]. The sign follows the means, whatever that of `direction`. Raises ExampleError when the
    means do not differ along it.
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
