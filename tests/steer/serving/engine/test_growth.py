"""What requests make grow is bounded: after thousands of different ones, as much is held as after a few."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import fakes
import pytest
import torch

from steer.serving.engine import bounds, frontend_hooks, metrics, receipts, resolved
from steer.serving.engine.admission import MOST_VECTORS, Admission
from steer.serving.engine.capacity import Capacity
from steer.serving.engine.phases import phases
from steer.serving.engine.resolved import resolved_of
from steer.serving.engine.worker.rows import Stack
from steer.serving.engine.worker.slots import SlotTable
from steer.serving.settings import Settings
from vectors.errors import SteerError, UsageError
from vectors.expression import parse
from vectors.steering import SteeringVector

VECTORS = fakes.vectors()
STACKS = {name: Stack(vector) for name, vector in VECTORS.items()}
FORMS = ["0*warm@first:{}", "{}*warm", "0*calm@after:{} + 0*warm", "warm@first:{}", "clamp(calm, {})@response"]


def sizes(*owners: Any) -> dict[str, int]:
    """The number of entries of every container that these objects hold."""
    return {
        f"{type(owner).__name__}.{name}": len(value)
        for owner in owners
        for name, value in vars(owner).items()
        if hasattr(value, "__len__") and not isinstance(value, (str, torch.Tensor))
    }


def test_twenty_thousand_compositions_leave_the_table_as_it_was_after_the_first() -> None:
    table = SlotTable(range(fakes.LAYERS), 4, fakes.HIDDEN, 1, torch.device("cpu"))
    after = {}
    for i in range(20_000):
        composition = parse(FORMS[i % 2 * 2 if i % 10 else i // 10 % len(FORMS)].format(i + 1))
        table.take(str(i), composition, phases(composition), STACKS)
        table.release(str(i))
        if i in (500, 19_999):
            after[i] = sizes(table)
    assert after[500] == after[19_999]
    assert len(table.choices) <= 4
    assert table.spare + len(table.free) == 4


def test_the_front_end_and_the_scheduler_remember_a_bounded_number_of_compositions() -> None:
    found, capacity = Admission(Settings(VECTORS), fakes.HIDDEN, fakes.LAYERS, None), Capacity(4)
    before = sizes(found, found.residency, capacity)
    for i in range(4_000):
        try:
            one = fakes.request(
                str(i), {"steer": [*FORMS, "unknown{}", "warm +", "1e39*warm + {}*calm"][i % 8].format(i)}
            )
            found.admit(one)
        except ValueError:
            continue
        assert capacity.enter(one)
        assert capacity.next_step() == []
        capacity.record({str(i): 3}, {"requests": [str(i)], "keys": [key(one)], "starts": [0]})
        assert capacity.leave(str(i))
    assert sizes(found, found.residency, capacity) == before
    assert len(resolved._PARSED) == resolved.MOST_PARSED
    resolved.parsed("3*warm")
    assert len(resolved._PARSED) == resolved.MOST_PARSED
    assert len(bounds._SIZES) <= 100
    refused = [labels for labels in metrics.get().refused._metrics]
    assert len(refused) <= 5, "metrics have a label for each reason, not for each expression"


def key(request: Any) -> str:
    found = resolved_of(request)
    assert found is not None
    return found.key


def test_requests_that_come_and_go_leave_nothing_in_the_engine_of_the_front_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frontend_hooks, "_invalid", ValueError)
    receipts.use(None)
    found = Admission(Settings(VECTORS), fakes.HIDDEN, fakes.LAYERS, None)
    processor = SimpleNamespace(request_states={}, steer_residency=found.residency)

    async def call(method: str, args: Any = ()) -> list[Any]:
        return [True]

    async def go() -> None:
        found.residency.connect(call)
        async with found.residency.delivered(VECTORS["warm"].digest, b""):
            found.residency.hold([VECTORS["warm"].digest])
        for i in range(1000):
            one = fakes.request(str(i), {"steer": f"{i}*warm"})
            found.admit(one)
            frontend_hooks.follow(
                lambda self, request: self.request_states.update({request.request_id: SimpleNamespace()}),
                processor,
                one,
            )
            frontend_hooks.finish(lambda self, state: None, processor, processor.request_states.pop(str(i)))
        (vector,) = found.residency._vectors.values()
        assert vector.holds == 1

    asyncio.run(go())


def test_names_of_vectors_are_bounded() -> None:
    found = Admission(Settings(VECTORS), fakes.HIDDEN, fakes.LAYERS, None)
    warm = VECTORS["warm"]
    for i in range(MOST_VECTORS - len(VECTORS)):
        found.bind(f"name{i}", warm, warm.digest)
    with pytest.raises(UsageError, match=f"this server holds {MOST_VECTORS} vectors already"):
        found.bind("one", warm, warm.digest)
    assert len(found.bound) == MOST_VECTORS
    assert not found.bind("warm", warm, warm.digest), "a name that stands can be bound to its vector again"
    found.unbind("name0")
    assert found.bind("another", warm, warm.digest)
    with pytest.raises(SteerError):
        found.bind("more", SteeringVector({0: torch.ones(fakes.HIDDEN)}), "sha256:1")
