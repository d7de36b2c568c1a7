"""Progress drawn from events: bars on a terminal, lines elsewhere, nothing when quiet."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from steer.cli import progress
from steer.cli.progress import Progress
from vectors.events import Event


def test_elsewhere_a_stage_of_unknown_length_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as show:
        show(Event("loading the model"))
        show(Event("loading the model"))
        show(Event("measuring", 1, 10))
        show(Event("measuring", 2, 10, message="step 2  loss 0.5"))
    assert capsys.readouterr().err == "loading the model …\nstep 2  loss 0.5\n"


def test_elsewhere_a_long_stage_says_now_and_then_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress() as show:
        for done in range(101):
            now[0] = float(done)
            show(Event("sampling from the teacher", done, 100, "prompts"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sampling from the teacher 30/100 prompts, 70 s left"
    assert len(lines) == 3


def test_a_stage_that_is_ended_draws_nothing_more_and_the_next_event_begins_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below a question to a person, the bar wiped what was typed."""
    with Progress() as show:
        show.drawn = True
        show(Event("reading answers"))
        bars = show.bars
        assert bars.live.is_started
        show.end()
        assert not bars.live.is_started
        show(Event("reading answers"))
        assert show.bars is not bars
        assert len(show.bars.tasks) == 1


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=True) as show:
        show(Event("loading the model", message="here"))
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_with_the_time_left_and_stdout_stays_data() -> None:
    code = (
        "import time; from steer.cli.output import out; from vectors.events import Event\n"
        "with out.progress() as show:\n"
        "    for done in range(4):\n"
        "        show(Event('measuring [bold]\\x1b[31m', done, 4, 'examples', {'loss': 0.5})); time.sleep(0.15)\n"
        "    out.say('a note'); out.line('data')\n"
    )
    leader, follower = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-c", code], stderr=follower, stdout=subprocess.PIPE, env=environment, text=True, check=True
    )
    os.close(follower)
    drawn = os.read(leader, 100_000).decode()
    os.close(leader)
    assert done.stdout == "data\n"
    assert "measuring [bold]\\x1b[31m" in drawn
    assert "3/4 examples" in drawn
    assert "loss 0.5" in drawn
    assert "left" in drawn
    assert "a note" in drawn
