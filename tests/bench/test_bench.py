"""What the benchmark measures, on a clock that only the work moves."""

from __future__ import annotations

from typing import Any

import pytest

from bench import extraction

LENGTH = 32


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one number."""
    now = [0.0]
    monkeypatch.setattr(extraction.time, "perf_counter", lambda: now[0])
    return now


def test_a_whole_call_is_timed(clock: list[float]) -> None:
    def work() -> str:
        clock[0] += 3.0
        return "whatever it says of itself"

    assert extraction.timed(work) == 3.0


def test_the_time_on_a_processor_is_another_clock(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    used = [0.0]
    monkeypatch.setattr(extraction.time, "process_time", lambda: used[0])

    def work() -> None:
        clock[0] += 3.0  # two of them waiting for others
        used[0] += 1.0

    assert extraction.timed(work) == 3.0
    assert extraction.timed(work, processor=True) == 1.0


@pytest.mark.parametrize("fastest", extraction.PASSES)
def test_the_bare_pass_is_the_fastest_of_its_shapes(fastest: int, clock: list[float]) -> None:
    def stack(input_ids: Any, use_cache: bool) -> None:
        assert not use_cache
        assert input_ids.shape[1] == LENGTH
        clock[0] += input_ids.numel() * (0.5 if input_ids.numel() == fastest else 1.0)

    assert extraction.bare(stack, 100, 2048, LENGTH) == 2048 * 0.5
