"""Progress events, by which a long function reports to its caller while it runs.

Every function that may take longer than a second has a keyword `on_event: OnEvent = ignore`. The library never prints;
the command line draws progress bars from these events, and a program may log them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """A report on the progress of a stage.

    `stage` is a phrase that a user reads, such as "loading the model". `done` of `total` counts `unit`s; both are None
    for a stage of unknown length. `metrics` are measured values by name, such as {"loss": 2.1}. `message` is a note for
    the user.
    """

    stage: str
    done: int | None = None
    total: int | None = None
    unit: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    message: str = ""


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The default listener, which does nothing."""


def counter(on_event: OnEvent, stage: str, unit: str = "") -> Callable[[int, int], None]:
    """A function of (done, total) that reports them as events of one stage."""

    def report(done: int, total: int) -> None:
        on_event(Event(stage, done, total, unit))

    return report
