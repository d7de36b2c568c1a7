"""Signals at random moments over commands that write; the whole trial is `make hostile`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TRIAL = """
import sys, tempfile, time
from pathlib import Path
import process_trial, warm_commands
trial = process_trial.Trial(Path(tempfile.mkdtemp(dir=sys.argv[1])), ("diff", "merge", "fold", "extract"))
trial.prepare()
process_trial.signals(trial, 12, 1, time.monotonic() + 60)
trial.together("merge") if warm_commands.namespaces_work() else None
trial.check_cache()
print(*trial.faults, sep="\\n")
sys.exit(bool(trial.faults))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_twelve_signals_leave_no_half_file_and_the_next_run_no_leftover(tmp_path: Path) -> None:
    """In a process of its own: this one has threads, which a fork does not copy."""
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1]), str(HERE.parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", TRIAL, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
