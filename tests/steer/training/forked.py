"""Processes that begin with the libraries of training loaded: each is `python -c SCRIPT` less ten seconds of imports.

As a program it is the process that loads the libraries, and then forks others: a request a line on stdin, an answer a
line on stdout.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIBRARIES = (
    "accelerate", "matplotlib.figure", "numba", "peft", "transformers.trainer", "steer.training.api",
    "steer.training.modes.distil",
)  # fmt: skip
LONGEST = 300  # seconds that processes may take


@dataclass(frozen=True)
class Ended:
    """The exit codes of processes, and what they wrote, all to the same two files."""

    codes: list[int]
    stdout: str
    stderr: str


class Forking:
    """The process that forks; one call of `start` and one of `wait` for each group of processes."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds what the processes print. They import from the project, and from tests/ after it."""
        self.folder = folder
        path = os.pathsep.join(str(Path(__file__).parents[up]) for up in (3, 2))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        # -P: the tests' own folder holds a folder `steer`, which must not stand before the package.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment, text=True,
        )  # fmt: skip

    def start(self, script: str, folder: Path, arguments: Sequence[str] = (), ranks: int = 0) -> list[int]:
        """Run the script in `folder`: by one process, or as torchrun does by so many. Returns their ids."""
        self.out, self.err = self.folder / "stdout", self.folder / "stderr"
        for file in (self.out, self.err):
            file.write_text("")
        request = {"script": script, "folder": str(folder), "arguments": list(arguments), "ranks": ranks}
        return list(self._ask({**request, "out": str(self.out), "err": str(self.err)}))

    def wait(self) -> Ended:
        """Wait until all processes have ended; when one fails, the others are killed."""
        return Ended(self._answer(), self.out.read_text(), self.err.read_text())

    def run(self, script: str, folder: Path, arguments: Sequence[str] = (), ranks: int = 0) -> Ended:
        """`start` and `wait`."""
        self.start(script, folder, arguments, ranks)
        return self.wait()

    def _ask(self, request: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process that forks has ended"
        return json.loads(line)

    def close(self) -> None:
        """End the process that forks."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def rendezvous(ranks: int) -> list[dict[str, str]]:
    """The environment of each rank, as torchrun makes it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    return [{**shared, "MASTER_PORT": str(port), "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]


def fork(request: dict[str, Any], environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.environ |= environment
        os.chdir(request["folder"])
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_APPEND), descriptor)
        sys.argv = ["-c", *request["arguments"]]
        exec(compile(request["script"], "script", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pids: Sequence[int]) -> list[int]:
    """The exit codes (negative for a signal) once all have ended; when one fails or takes too long, all are killed."""
    codes: dict[int, int] = {}
    end = time.monotonic() + LONGEST
    while len(codes) < len(pids):
        for pid in [pid for pid in pids if pid not in codes]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif any(codes.values()) or time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def main() -> None:
    """Load the libraries, and answer requests until stdin ends."""
    for name in LIBRARIES:
        importlib.import_module(name)
    threads = [thread.name for thread in threading.enumerate()]
    assert threads == ["MainThread"], f"a fork copies no threads: {threads}"
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        environments = rendezvous(request["ranks"]) if request["ranks"] else [{}]
        pids = [fork(request, environment) for environment in environments]
        print(json.dumps(pids), flush=True)
        print(json.dumps(wait(pids)), flush=True)


if __name__ == "__main__":
    main()
