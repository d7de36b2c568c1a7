"""Thousands of mutated files over all readers: each is refused by an error of ours, or read, in little time and memory.

    python tests/hostile/files/file_trial.py [--files 5000] [--seed 0] [--only NAME]

Files are read in a child process, which measures the processor time (of all its threads) and the memory of each
reading, and is ended where one takes more than `HANG` seconds by the clock. Prints a table, and writes the inputs that
failed into `hostile-failures/`; the exit code is 1 if any did.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

# Most processor time and memory of a reading, and most time by the clock, which other programs lengthen.
SECONDS, BYTES, HANG = 2.0, 256 << 20, 120.0
ROOT = Path(__file__).parents[3]


def child(folder: Path) -> None:
    """Read a subject's name and a folder from each line of stdin, and answer with a line of JSON."""
    import subjects

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    subject_of = subjects.build(folder)
    outcomes = {}
    for name in subject_of:  # everything is imported and compiled by now, so that only reading is measured
        copy = _copied(folder / name, folder / "warm-up")
        outcome = _outcome(subject_of[name], copy, subjects)
        outcomes[name] = outcome["outcome"] + (f": {outcome['detail']}" if outcome["outcome"] != "read" else "")
    print(json.dumps([outcomes, {n: s[:2] for n, s in subject_of.items()}]), file=answers, flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + (3 << 30),) * 2)
    for line in sys.stdin:
        name, place = json.loads(line)
        print(json.dumps(_outcome(subject_of[name], Path(place), subjects)), file=answers, flush=True)


def _copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target, copy_function=os.link))


def _outcome(subject: Any, folder: Path, subjects: Any) -> dict[str, Any]:
    here = os.getcwd()
    Path("/proc/self/clear_refs").write_text("5")  # the greatest resident size begins anew
    before, started, detail = _status("VmRSS"), time.process_time(), ""
    try:
        subject.reader(folder)
        outcome = "read"
    except subjects.Refused as error:
        outcome, detail = "refused", str(error)[:300]
    except subjects.Defect as error:
        outcome, detail = "crashed", str(error)
    except BaseException:
        outcome, detail = "crashed", traceback.format_exc()[-1500:]
    seconds = time.process_time() - started
    os.chdir(here)
    return {"outcome": outcome, "detail": detail, "seconds": seconds, "bytes": _status("VmHWM") - before}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise ValueError(field)


class Child:
    """The process that reads; started anew after a hang or a crash of the whole process."""

    def __init__(self, work: Path) -> None:
        self.work, self.process = work, None

    def start(self) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
        """Start it and wait until it has built its subjects.

        Returns how each is read when nothing is changed, and its file and form.
        """
        self.folder = Path(tempfile.mkdtemp(dir=self.work))
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
        environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"XDG_CACHE_HOME": str(self.folder / "cache")}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", str(self.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment,
        )  # fmt: skip
        return self._answer(600) or ({}, {})

    def read(self, name: str, folder: Path) -> dict[str, Any]:
        """How the subject in a folder is read."""
        self.process.stdin.write(json.dumps([name, str(folder)]).encode() + b"\n")
        self.process.stdin.flush()
        answer = self._answer(HANG)
        if answer is None:
            hung = self.process.poll() is None
            self.process.kill()
            self.process.wait()
            self.start()
            return {"outcome": "hung" if hung else "died", "detail": "", "seconds": HANG, "bytes": 0}
        return answer

    def _answer(self, seconds: float) -> Any:
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def stop(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(30)


def main() -> int:
    """Run the trial; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=120, help="time after which no file is read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--failures", type=Path, default=Path("hostile-failures"))
    parser.add_argument("--child", type=Path)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return 0
    import mutations

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        reading = Child(work)
        unchanged, files = reading.start()
        bad = {name: outcome for name, outcome in unchanged.items() if outcome != "read"}
        if bad or not unchanged:
            print("not read as they stand:", bad or "nothing could be built")
        names = [name for name in unchanged if options.only in name]
        counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in names}
        worst = {name: [0.0, 0.0] for name in names}
        failures, end, done = [], time.monotonic() + 60 * options.minutes, 0
        for number in range(options.files):
            if time.monotonic() > end:
                break
            done += 1
            name = names[number % len(names)]
            chance = random.Random(f"{options.seed} {number}")
            file, form = files[name]
            folder = _copied(reading.folder / name, work / "case")
            original = (folder / file).read_bytes()
            changed = mutations.BY_FORM[form](original, chance)
            (folder / file).unlink()
            (folder / file).write_bytes(changed)
            answer = reading.read(name, folder)
            outcome = answer["outcome"]
            if outcome in ("read", "refused") and answer["seconds"] > SECONDS:
                outcome = "slow"
            elif outcome in ("read", "refused") and answer["bytes"] > BYTES:
                outcome = "large"
            counts[name][outcome] += 1
            worst[name] = [max(worst[name][0], answer["seconds"]), max(worst[name][1], answer["bytes"])]
            if outcome not in ("read", "refused"):
                failures.append((name, number, outcome, answer))
                options.failures.mkdir(exist_ok=True)
                (options.failures / f"{name}-{options.seed}-{number}").write_bytes(changed)
        reading.stop()
    print(f"{'subject':24} {'refused':>8} {'read':>6} {'failed':>7} {'worst s':>8} {'worst MB':>9}")
    for name in names:
        failed = sum(counts[name].values()) - counts[name]["read"] - counts[name]["refused"]
        seconds, size = worst[name]
        print(
            f"{name:24} {counts[name]['refused']:8} {counts[name]['read']:6} {failed:7} {seconds:8.2f} "
            f"{size / 1e6:9.1f}"
        )
    for name, number, outcome, answer in failures[:100]:
        print(f"\n{name} {number} {outcome} {answer['seconds']:.2f} s {answer['bytes'] >> 20} MB\n{answer['detail']}")
    print(f"\n{done} files of {len(names)} kinds, {len(failures)} failures")
    return bool(failures or bad)


if __name__ == "__main__":
    sys.exit(main())
