"""Work beside the event loop, which is never far from its turn."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest

from steer.serving.engine import background


def test_work_runs_in_one_thread_that_lets_the_event_loop_run_often() -> None:
    before = sys.getswitchinterval()

    def seen(fail: bool) -> tuple[threading.Thread, float]:
        if fail:
            raise ZeroDivisionError
        return threading.current_thread(), sys.getswitchinterval()

    async def several() -> list[tuple[threading.Thread, float] | BaseException]:
        work = [background.run(seen, number == 2) for number in range(5)]
        return await asyncio.gather(*work, return_exceptions=True)

    found = asyncio.run(several())
    assert isinstance(found.pop(2), ZeroDivisionError)
    ((thread, interval),) = set(found)  # type: ignore[misc]
    assert thread is not threading.main_thread()
    assert interval == pytest.approx(background.SWITCH)
    assert interval < before
    assert sys.getswitchinterval() == before
