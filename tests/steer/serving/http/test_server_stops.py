"""How `steer serve` ends: each of these tests ends the shared server, so they stand in the last file that uses it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from serve_process import Serving, children


def gone(processes: set[int]) -> bool:
    end = time.monotonic() + 20
    while any(
        Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in processes
    ):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def require_nothing_left(server: Serving, below: set[int]) -> None:
    assert gone(below)
    assert "Traceback" not in server.said()
    assert str(server.folder / "vllm.log") in server.said()


def test_a_dead_engine_ends_it_with_an_error_and_nothing_left(server: Serving) -> None:
    below = children(server.process.pid)
    engine = next(pid for pid in below if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(engine, signal.SIGKILL)
    assert server.process.wait(60) == 1
    assert "error: the server has ended" in server.said()
    assert "hint: the whole log is" in server.said()
    require_nothing_left(server, below)


def test_ctrl_c_ends_it_with_nothing_left(server: Serving) -> None:
    below = children(server.process.pid)
    assert len(below) >= 2
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0
    assert server.said().endswith("ended\n")
    require_nothing_left(server, below)
