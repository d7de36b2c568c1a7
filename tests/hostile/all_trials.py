"""All hostile trials, one after another, each to its end or its time: `make hostile`.

    .venv/bin/python tests/hostile/all_trials.py [--small] [--only processes]

What each prints is passed on, and written to `hostile-failures/NAME.txt`. In the end each trial's last line is printed
again. The exit code is 1 if any trial found a fault, failed, or took longer than it may. `--small` sends few requests,
files and signals, in about ten minutes, to see that all trials run.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FAILURES = Path("hostile-failures")
GRACE = 30  # seconds between SIGTERM and SIGKILL


class Trial(NamedTuple):
    """A trial: its script, its options, those of a small one, and the minutes after which it is ended."""

    script: str
    options: tuple[str, ...]
    small: tuple[str, ...]
    minutes: float


# Through Triton's interpreter, vLLM's V2 runner takes 15 ms for a token of a small vocabulary, and seconds for others.
V2 = ("--runner", "v2", "--model", "pico")

# The trials bound themselves (--minutes); what stands here is for one that hangs.
TRIALS = {
    "processes": Trial("processes/process_trial.py", (), ("--signals", "15", "--rounds", "1", "--minutes", "5"), 90),
    "serving": Trial("serving/http_trial.py", (), ("--requests", "300", "--minutes", "5"), 120),
    "serving-v2": Trial("serving/http_trial.py", V2, (*V2, "--requests", "100", "--minutes", "5"), 120),
    "gates": Trial("serving/gates_trial.py", (), (), 30),
    "files": Trial("files/file_trial.py", (), ("--files", "150", "--minutes", "5"), 150),
}


def run(name: str, trial: Trial, small: bool) -> tuple[int | None, float, str]:
    """Run a trial; returns its exit code (None when its time was over), its minutes and its last line."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    began, last, over = time.monotonic(), "", threading.Event()
    command = [sys.executable, str(HERE / trial.script), *(trial.small if small else trial.options)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        errors="replace",
    )  # fmt: skip

    def end() -> None:
        over.set()
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(60 * (15 if small else trial.minutes), end)
    timer.start()
    assert process.stdout is not None
    try:
        with (FAILURES / f"{name}.txt").open("w") as log:
            for line in process.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                log.write(line)
                last = line.strip() or last
        code = process.wait()
    except BaseException:  # Ctrl-C ends the trial too, which is a session of its own
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(GRACE)
        raise
    finally:
        timer.cancel()
    return None if over.is_set() else code, (time.monotonic() - began) / 60, last


def main() -> int:
    """Run the trials; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="few requests, files and signals")
    parser.add_argument("--only", choices=tuple(TRIALS), help="one trial")
    options = parser.parse_args()
    FAILURES.mkdir(exist_ok=True)
    outcomes = {}
    for name in [options.only] if options.only else TRIALS:
        print(f"== {name}", flush=True)
        outcomes[name] = run(name, TRIALS[name], options.small)
    print("\n== summary")
    for name, (code, minutes, last) in outcomes.items():
        how = "took too long" if code is None else "no fault" if code == 0 else f"failed, with code {code}"
        print(f"{name:10} {how}, {minutes:.1f} minutes: {last[:300]}")
    return int(any(code != 0 for code, _, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
