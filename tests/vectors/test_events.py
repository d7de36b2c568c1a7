"""Progress events."""

from __future__ import annotations

import dataclasses

import pytest

from vectors.events import Event, counter, ignore


def test_an_event_needs_a_stage_alone_and_can_not_be_changed() -> None:
    event = Event("loading the model")
    assert (event.done, event.total, event.unit, dict(event.metrics), event.message) == (None, None, "", {}, "")
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.stage = "other"  # type: ignore[misc]
    ignore(event)


def test_a_counter_reports_one_stage_with_its_unit() -> None:
    events: list[Event] = []
    report = counter(events.append, "merging", "bytes")
    report(1, 4)
    report(4, 4)
    assert events == [Event("merging", 1, 4, "bytes"), Event("merging", 4, 4, "bytes")]
