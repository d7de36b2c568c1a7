"""A real PostgreSQL on loopback in a temporary folder, which tests start, kill and start again.

Debian's packages have it in /usr/lib/postgresql. It refuses to run as root, so root runs it as another user.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

MISSING = "PostgreSQL is not installed: apt-get install postgresql"
_NUMBERS = itertools.count()


def programs() -> Path | None:
    """The folder with initdb and postgres; None where PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("postgres")
    return Path(on_path).resolve().parent if on_path else None


class Server:
    """A PostgreSQL server with its data in `folder`, listening on a port of loopback."""

    def __init__(self, folder: Path) -> None:
        bin_folder = programs()
        if bin_folder is None:
            # CI installs it where it can; where it can't, this skip says so.
            pytest.skip(MISSING)
        self.bin, self.folder = bin_folder, folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.user: str | None = None
        if os.getuid() == 0:
            self.user = next(name for name in ("postgres", "nobody") if _exists(name))
            shutil.chown(folder, self.user)
            folder.chmod(0o700)
        data = folder / "data"
        subprocess.run(
            [self.bin / "initdb", "-D", data, "-U", "steer", "--auth=trust", "--no-sync", "-E", "UTF8"],
            check=True, capture_output=True, user=self.user, cwd="/",
        )  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self.process = subprocess.Popen(
            [self.bin / "postgres", "-D", self.folder / "data", "-p", str(self.port), "-h", "127.0.0.1",
             "-k", self.folder, "-c", "shared_buffers=8MB", "-c", "max_connections=30",
             "-c", "fsync=off"],  # processes are killed here, not machines
            stdout=subprocess.DEVNULL, stderr=(self.folder / "log").open("ab"), user=self.user, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + 60
        ready = [self.bin / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port), "-q"]
        while subprocess.run(ready).returncode:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < end, (self.folder / "log").read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        """End the server and all its processes with SIGKILL."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        # The postmaster's children have sessions of their own; they end when the postmaster has gone.
        time.sleep(0.2)

    def stop(self) -> None:
        """End the server at once: its data are removed with it."""
        self.kill()

    def new_log(self) -> str:
        """The URL of a new, empty log: a schema of its own, which is made in no time."""
        import psycopg

        name = f"log{next(_NUMBERS)}"
        with psycopg.connect(f"host=127.0.0.1 port={self.port} user=steer dbname=postgres") as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return f"postgresql+psycopg://steer@127.0.0.1:{self.port}/postgres?options=-csearch_path%3D{name}"


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A running server, ended at the end. Its folder is made where another user may enter it."""
    with tempfile.TemporaryDirectory(prefix="steer-postgres-", ignore_cleanup_errors=True) as folder:
        server = Server(Path(folder))
        try:
            yield server
        finally:
            server.stop()


def _exists(user: str) -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwnam(user))
    return False
