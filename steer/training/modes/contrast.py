"""The contrastive difference: train on a trait and on its opposite and subtract, so that shared form and topic cancel.

theta+ - theta- (Fierro and Roger 2025, arXiv:2511.05408) is a task vector, which `steer merge` can combine further.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.training.modes import imitate
from steer.training.modes.imitate import ImitateRequest
from vectors.errors import SteerError, UsageError, collecting, raise_together
from vectors.events import OnEvent, ignore
from vectors.registry.options import option

if TYPE_CHECKING:
    from steer.training.difference import Half

MODE = "train"
SUMMARY = "on completions of a trait and of its opposite"
NEEDS = ("data", "against")


@dataclass(frozen=True, kw_only=True)
class ContrastRequest(ImitateRequest):
    """Training on a trait and on its opposite; the result is the difference."""

    against: Path | None = option(
        None,
        help="Completions that show the opposite of --data; the difference of both trainings is written.",
        group="Data",
    )

    def half(self, data: Path, out: Path) -> ImitateRequest:
        """The request that trains on one of the two files, as a vector at `out`."""
        names = [each.name for each in dataclasses.fields(ImitateRequest)]
        return ImitateRequest(
            **{**{name: getattr(self, name) for name in names}, "data": data, "out": out, "as_": "vector"}
        )


REQUEST = ContrastRequest


def run(request: ContrastRequest, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Train on both files, and write the difference; returns a report of it and of both trainings.

    Raises UsageError for an adapter, since the difference of two has twice their rank; and what `bake` raises.
    """
    from steer.training.difference import train_difference
    from steer.training.distributed import processes

    if processes.count() > 1 or request.settings.sharded:
        raise UsageError("--against trains in one process", "start it without a launcher, and without --fsdp")
    if request.as_ == "lora":
        raise UsageError("the difference of two adapters has twice their rank", "use --as vector or --as model")
    return train_difference(request, *_halves(request), on_event=on_event)


def _halves(request: ContrastRequest) -> list[Half]:
    """Both trainings. Raises all problems of both files together."""
    from probes.data.overlap import shared
    from steer.training import work
    from steer.training.bake import job_of
    from steer.training.difference import Half

    errors: list[SteerError] = []
    halves = []
    for name, file, weight in (("for", request.data, 1.0), ("against", request.against, -1.0)):
        if file is None:
            option = "--data" if name == "for" else "--against"
            errors.append(UsageError(f"there is nothing to contrast: no {option}", f"give {option} FILE"))
            continue
        half = request.half(file, work.path_of(request.out) / f"{name}.safetensors")
        with collecting(errors):
            halves.append(Half(name, half, imitate.mode(half), weight))
    if len(halves) == 2:
        (trait,), (opposite,) = (half.mode.examples.values() for half in halves)
        both = shared(trait, opposite)
        if len(both) == len(trait):
            errors.append(UsageError("--against holds every example of --data, so nothing is left", "give two files"))
        elif both:
            warnings.warn(
                f"{len(both)} of the {len(trait)} examples of --data are in --against too, where they cancel out",
                stacklevel=2,
            )
    if errors and halves:
        with collecting(errors):
            job_of(request, halves[0].mode)
    raise_together(errors)
    return halves
