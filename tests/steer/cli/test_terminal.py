"""What a terminal gets is drawn, and what a pipe gets is plain and always the same."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

from steer.cli.terminal import clean

SCRIPT = (
    "from steer.cli.output import out\n"
    "out.table(['layer', 'norm'], [['1', '2.50'], ['\\x1b[31m12', '[bold]3']], left=1)\n"
    "out.side_by_side(['strength 0', 'strength +2'], ['good day', 'dear friend\\x07'])\n"
)
PLAIN = (
    "layer          norm\n"
    "1              2.50\n"
    "\\x1b[31m12  [bold]3\n"
    "strength 0                                         strength +2\n"
    "------------------------------------------------   ------------------------------------------------\n"
    "good day                                           dear friend\\x07\n"
)


def test_a_pipe_gets_plain_text() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "99"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, env=environment, text=True, check=True
    )
    assert [line.split() for line in done.stdout.splitlines()] == [line.split() for line in PLAIN.splitlines()]
    assert "\x1b" not in done.stdout


def test_a_terminal_gets_a_drawn_table_without_the_escapes_of_its_texts() -> None:
    leader, follower = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "99", "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", SCRIPT], stdout=follower, env=environment, check=True)
    os.close(follower)
    drawn = os.read(leader, 100_000).decode()
    os.close(leader)
    assert "──" in drawn
    assert "\\x1b[31m12" in drawn
    assert "[bold]3" in drawn
    assert "dear friend\\x07" in drawn
    assert "\x07" not in drawn


def test_newlines_and_tabs_stay_and_controls_are_shown() -> None:
    assert clean("a\tb\nc\rd\x7fe\u2066f") == "a\tb\nc\\rd\\x7fe\\u2066f"
    assert clean("é 漢 🙂") == "é 漢 🙂"
