"""`make hostile` runs every trial, whatever becomes of the others, and fails if one of them has."""

from __future__ import annotations

import sys
from pathlib import Path

import all_trials
import pytest
from all_trials import Trial

SCRIPTS = {
    "good": "print('a line'); print('0 faults')",
    "faulty": "import sys; print('2 faults'); sys.exit(1)",
    "hanging": "import time; print('began'); time.sleep(600)",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(all_trials, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *names: str) -> int:
    trials = {name: Trial(f"{name}.py", (), (), 1 / 60 if name == "hanging" else 1) for name in names}
    monkeypatch.setattr(all_trials, "TRIALS", trials)
    monkeypatch.setattr(sys, "argv", ["all_trials.py"])
    return all_trials.main()


def test_a_fault_or_a_hang_of_one_trial_lets_the_others_run_and_fails_in_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "faulty", "hanging", "good") == 1
    summary = capsys.readouterr().out.partition("== summary")[2].splitlines()[1:]
    assert [" ".join(line.split()[:4]) for line in summary] == [
        "faulty failed, with code",
        "hanging took too long,",
        "good no fault, 0.0",
    ]
    assert (folder / "hostile-failures" / "good.txt").read_text() == "a line\n0 faults\n"


def test_it_succeeds_where_nothing_was_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "good") == 0
