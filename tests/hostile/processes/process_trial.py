"""Signals at random moments, and processes in two PID namespaces on one folder, over every command that writes.

    PYTHONPATH=tests python tests/hostile/processes/process_trial.py --signals 300 --rounds 50

After each signal: nothing half-written under a final name; after SIGINT and SIGTERM no temporary file; the same command
again succeeds, its bytes are those of an undisturbed run, and nothing else is left. Of two processes each gives the
right result or a clear refusal, and at least one the result.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import warm_commands as warm

RESUMABLE = re.compile(r"\.out(\.safetensors)?\.(bake|[0-9a-f]{16}\.partial)")  # work that an interrupt may leave
REFUSALS = re.compile(r"another process is writing|exists( now)?$|exists, and|Directory not empty", re.MULTILINE)
TWICE = -1  # SIGTERM, and SIGINT while the command cleans up
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, TWICE)


@dataclass
class Trial:
    """The commands, what they write undisturbed, how long that takes, and the faults found so far."""

    folder: Path
    names: Sequence[str] = ()
    references: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def prepare(self) -> None:
        """Make the inputs, and run every command undisturbed, the second time with a clock."""
        inputs = self.folder / "inputs"
        inputs.mkdir(parents=True)
        warm.make_inputs(inputs)
        self.commands = warm.commands(inputs)
        warm.load(self.commands, self._place("warm"))
        for name in ("extract", "diff"):  # their outputs are inputs of others
            self._undisturbed(name)
        for source, target in (("extract", "extracted"), ("diff", "task")):
            shutil.copy(self.folder / f"reference {source}" / "out.safetensors", inputs / f"{target}.safetensors")
        self.names = self.names or tuple(self.commands)
        for name in self.names:
            self._undisturbed(name)
            self._undisturbed(name)

    def _undisturbed(self, name: str) -> None:
        place = self._place(f"reference {name}")
        began = time.monotonic()
        code = warm.wait(warm.start(self.commands[name], place, log=self.log))
        self.seconds[name], self.references[name] = time.monotonic() - began, warm.tree(place)
        if code:
            raise SystemExit(f"{name} fails undisturbed:\n{self.log.read_text()}")

    @property
    def log(self) -> Path:
        """What the commands print."""
        return self.folder / "log"

    def _place(self, name: str) -> Path:
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        self.log.unlink(missing_ok=True)
        return place

    def interrupt(self, name: str, sent: int, share: float) -> None:
        """Send a signal after a share of the command's usual time, and check what is left; then run it again."""
        place, label = self._place("place"), f"{name}, signal {sent} after {share:.2f}"
        pid = warm.start(self.commands[name], place, log=self.log)
        time.sleep(share * self.seconds[name])
        self._send(pid, sent)
        try:
            code = warm.wait(pid)
        except TimeoutError as error:
            self.faults.append(f"{label}: {error}")
            return
        self.outcomes[f"{'SIGTERM + SIGINT' if sent == TWICE else signal.Signals(sent).name}: ended with {code}"] += 1
        self._check_interrupted(name, place, label, orderly=sent in (signal.SIGTERM, signal.SIGINT), done=code == 0)
        for path in place.iterdir():  # a finished output is refused by the next run
            if not path.name.startswith("."):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if name == "serve":
            time.sleep(0.5)  # the server, which holds the lock of its folder too, ends with its parent
        self.log.unlink(missing_ok=True)
        code = warm.wait(warm.start(self.commands[name], place, log=self.log))
        if code:
            self.faults.append(f"{label}: the next run ended with {code}: {self.log.read_text()[-500:]}")
        elif (left := warm.tree(place)) != self.references[name]:
            self.faults.append(f"{label}: the next run left {_difference(left, self.references[name])}")

    @staticmethod
    def _send(pid: int, sent: int) -> None:
        try:
            os.kill(pid, signal.SIGTERM if sent == TWICE else sent)
            if sent == TWICE:
                time.sleep(0.003)
                os.kill(pid, signal.SIGINT)
        except ProcessLookupError:
            pass

    def _check_interrupted(self, name: str, place: Path, label: str, *, orderly: bool, done: bool) -> None:
        left, reference = warm.tree(place), self.references[name]
        wrong = sorted(file for file, digest in left.items() if file[0] != "." and reference.get(file) != digest)
        if wrong:
            self.faults.append(f"{label}: not what an undisturbed run writes: {wrong}")
        if any(file.startswith("out/") for file in left) and not done:
            missing = sorted(file for file in reference if file.startswith("out/") and file not in left)
            if missing:
                self.faults.append(f"{label}: the output lacks {missing}")
        if done and left != reference:
            self.faults.append(f"{label}: ended with 0 and left {_difference(left, reference)}")
        hidden = sorted({file.split("/")[0] for file in left if file[0] == "."})
        if orderly and (rest := [entry for entry in hidden if not RESUMABLE.fullmatch(entry)]):
            self.faults.append(f"{label}: left {rest}")

    def together(self, name: str) -> None:
        """Run a command twice at once on one folder, each as process 1 of a PID namespace."""
        place = self._place("place")
        logs = [self.folder / f"log {i}" for i in range(2)]
        for log in logs:
            log.unlink(missing_ok=True)
        pids = [warm.start(self.commands[name], place, log=log, namespace=True) for log in logs]
        codes = [warm.wait(pid) for pid in pids]
        self.outcomes[f"together, {name}: {codes.count(0)} right"] += 1
        for code, log in zip(codes, logs, strict=True):
            text = log.read_text()
            if code and (not REFUSALS.search(text) or "defect" in text or "Traceback" in text):
                self.faults.append(f"two at once, {name}: ended with {code}: {text[-500:]}")
        if 0 not in codes:
            self.faults.append(f"two at once, {name}: neither has written")
        if (left := warm.tree(place)) != self.references[name]:
            self.faults.append(f"two at once, {name}: left {_difference(left, self.references[name])}")

    def check_cache(self) -> None:
        """The cache of all commands: what is left there goes with the next write."""
        warm.wait(warm.start(self.commands["diff"], self._place("place"), log=self.log))
        left = [str(path) for path in (self.folder / "inputs").rglob("*") if ".steer-" in path.name]
        if left:
            self.faults.append(f"left in the cache: {left}")


def _difference(left: dict[str, str], reference: dict[str, str]) -> str:
    more, less = sorted(left.keys() - reference.keys()), sorted(reference.keys() - left.keys())
    other = sorted(file for file in left.keys() & reference.keys() if left[file] != reference[file])
    return f"more: {more}, less: {less}, other bytes: {other}"


def signals(trial: Trial, count: int, seed: int, until: float) -> int:
    """Interrupt commands in turn, with each signal; returns how many were sent."""
    draw = random.Random(seed)
    for number in range(count):
        if time.monotonic() > until:
            return number
        name = trial.names[number % len(trial.names)]
        trial.interrupt(name, SIGNALS[number // len(trial.names) % len(SIGNALS)], draw.uniform(0, 1.1))
    return count


def main() -> None:
    """Run the trial, print figures and faults, and exit with 1 if there are faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=300, help="Signals over all commands.")
    parser.add_argument("--rounds", type=int, default=50, help="Rounds of two processes at once, for each command.")
    parser.add_argument("--minutes", type=float, default=60, help="Time after which no new case begins.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the moments.")
    parser.add_argument("--only", help="One command by name.")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    folder = Path(tempfile.mkdtemp(prefix="process-trial-"))
    trial = Trial(folder, (options.only,) if options.only else ())
    trial.prepare()
    print("seconds undisturbed:", {name: round(value, 2) for name, value in trial.seconds.items()}, flush=True)
    sent = signals(trial, options.signals, options.seed, until)
    print(f"{sent} signals, {len(trial.faults)} faults", flush=True)
    rounds = 0
    if not warm.namespaces_work():
        print("this user can't make PID namespaces: processes at once are left out")
        options.rounds = 0
    for _ in range(options.rounds):
        for name in [name for name in ("diff", "merge", "fold") if name in trial.names]:
            if time.monotonic() < until:
                trial.together(name)
                rounds += 1
    trial.check_cache()
    print(f"{rounds} rounds of two processes at once")
    for outcome, number in sorted(trial.outcomes.items()):
        print(f"  {number:4d}  {outcome}")
    print(f"{len(trial.faults)} faults")
    for fault in trial.faults:
        print("-", fault)
    shutil.rmtree(folder)
    sys.exit(bool(trial.faults))


if __name__ == "__main__":
    main()
