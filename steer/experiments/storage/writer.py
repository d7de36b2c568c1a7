"""The thread that takes rows to the database in batches, while requests go on."""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from steer.experiments.storage import journal
from steer.experiments.storage.database import (
    LogError,
    about_the_rows,
    file_of,
    identity_of,
    prepare,
    reason_of,
    write,
)
from steer.experiments.storage.journal import Journal, Row, cleaned
from steer.experiments.storage.tables import ALL, EVENTS
from vectors.errors import SteerError

_log = logging.getLogger("steer")

BATCH = 1000  # rows of one transaction
INTERVAL = (
    1.0  # seconds for which rows are collected: a transaction takes as long as fifty rows; events wait not at all
)
WAITING = 10_000  # rows in memory, while the journal can't be written
LONGEST_PAUSE = 2.0  # seconds between attempts while the database is away

Place = Literal["disk", "memory", "dropped"]


class LogState(NamedTuple):
    """How a log is doing: rows that wait for the database, rows lost, and why the database is away (else empty)."""

    waiting: int
    dropped: int
    away: str


class Writer:
    """Writes rows to a log through a journal in `folder`. `add` never waits for the database and never raises.

    `is_log` says whether a SQLite file that has taken the place of the log may have the rows. Ends with `close`.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        is_log: Callable[[], bool] = lambda: True,
        *,
        waiting: int = WAITING,
        **journal_options: int,
    ) -> None:
        self.engine, self.journal = engine, Journal(folder, **journal_options)
        self.file, self.is_log = file_of(engine), is_log
        self.checked: tuple[int, int] | None = None  # the file that is known to be the log
        self.most_waiting = waiting
        self.memory: collections.deque[Row] = collections.deque()
        self.dropped = 0
        self.away = ""
        self.idle = threading.Condition()
        self.closing = False
        self.attempt_now = threading.Event()
        self.thread = threading.Thread(target=self._run, name="steer-log", daemon=True)
        self.thread.start()

    def add(self, table: str, row: Mapping[str, Any]) -> Place:
        """Take a row; where it is now: on disk, where it outlives this process, in memory, or dropped, as both are
        full."""
        place: Place = "disk"
        if not self.journal.append((table, row)):
            place = "memory" if len(self.memory) < self.most_waiting else "dropped"
        if place == "memory":
            self.memory.append((table, cleaned(row)))
        elif place == "dropped":
            self.dropped += 1
        if table == EVENTS.name:  # such as a stop, which other servers are to see
            self.attempt_now.set()
        return place

    def state(self) -> LogState:
        """How the log is doing now."""
        return LogState(self.journal.rows + len(self.memory), self.dropped, self.away)

    def flush(self, seconds: float) -> bool:
        """Wait until all rows taken so far are in the database, at most so long; whether they are."""
        end = time.monotonic() + seconds
        self.attempt_now.set()
        with self.idle:
            return self.idle.wait_for(lambda: self.state().waiting == 0, max(end - time.monotonic(), 0))

    def close(self, seconds: float = 5.0) -> bool:
        """Write what waits, at most so long, and end the thread; whether all rows are in the database or on disk."""
        written = self.flush(seconds)
        self.closing = True
        self.attempt_now.set()
        self.thread.join(seconds)
        on_disk = not self.memory
        self.journal.close()
        return written or on_disk

    def _run(self) -> None:
        pause = INTERVAL
        while not self.closing:
            self.attempt_now.wait(pause)
            self.attempt_now.clear()
            try:
                self._require_log()
                while self._write_batch():
                    pass
                pause = INTERVAL
                self._is_back()
            except Exception as error:  # whatever it is, the thread goes on, and the state says why rows wait
                self._is_away(error)
                pause = min(pause * 2, LONGEST_PAUSE)
            with self.idle:
                self.idle.notify_all()

    def _write_batch(self) -> bool:
        """Write some rows; whether there may be more. Raises SQLAlchemyError where the database is away."""
        rows, size = self.journal.read(BATCH)
        if rows:
            self._write(rows)
            self.journal.done(len(rows), size)
            return True
        rows = [self.memory[i] for i in range(min(len(self.memory), BATCH))]
        if rows:
            self._write(rows)
            for _ in rows:
                self.memory.popleft()
        return bool(rows)

    def _write(self, rows: Sequence[Row]) -> None:
        """Write rows to the file that the log's path names before and after. Raises LogError, SQLAlchemyError."""
        self._require_log()
        dropped = written(self.engine, rows)
        if self.file is not None and identity_of(self.file) != self.checked:
            raise LogError(f"{self.file.name} has been moved or replaced")  # rows are written again, which is harmless
        self.dropped += dropped

    def _require_log(self) -> None:
        """See that the SQLite file of the log is there, and that one which has taken its place is the log too.

        An empty one is not: stages, stops and epochs would be gone. Raises LogError, NewerLog, SQLAlchemyError.
        """
        if self.file is None:
            return
        now = identity_of(self.file)
        if now is None:
            raise LogError(
                f"{self.file.name} is not there any more: put it back, with the -wal file that was beside it, or "
                "restart the server, which begins a new log"
            )
        if now == self.checked:
            return
        if not self.is_log():
            raise LogError(
                f"{self.file.name} is another file, which does not know the version that is served: put the log back, "
                "or restart the server, which goes on with this one"
            )
        prepare(self.engine)
        self.checked = now

    def _is_away(self, error: Exception) -> None:
        """Note why the database is away, say it once, and let go of it, so that the next attempt opens it anew."""
        if not self.away:
            _log.warning(
                "the log %s is away, and rows wait in the journal: %s",
                self.engine.url.render_as_string(),
                reason_of(error),
            )
        self.away, self.checked = reason_of(error), None
        with contextlib.suppress(SQLAlchemyError, OSError, SteerError):
            self.engine.dispose()
            if self.file is None:
                prepare(self.engine)  # a database that comes back may be an empty one

    def _is_back(self) -> None:
        if self.away:
            _log.warning("the log %s is back, and has the rows that waited", self.engine.url.render_as_string())
        self.away = ""


def written(engine: Engine, rows: Sequence[Row]) -> int:
    """Write rows in one transaction; a row that the database refuses is left out. Return how many were left out.

    Raises SQLAlchemyError where the database is away, or refuses for reasons of its own.
    """
    known = [row for row in rows if row[0] in ALL]
    unknown = len(rows) - len(known)
    try:
        write(engine, known)
        return unknown
    except (SQLAlchemyError, OverflowError) as error:
        if not about_the_rows(error):
            raise
    if len(known) == 1:
        return unknown + 1
    half = len(known) // 2
    return unknown + written(engine, known[:half]) + written(engine, known[half:])


def recover(engine: Engine, folder: Path, on_damage: Callable[[int], None] = lambda count: None) -> int:
    """Take the rows that killed servers have left in `folder` into the database; return how many there were.

    Raises SQLAlchemyError, OSError.
    """
    count = 0
    for rows, damaged in journal.abandoned(folder):
        for start in range(0, len(rows), BATCH):
            damaged += written(engine, rows[start : start + BATCH])
        count += len(rows)
        if damaged:
            on_damage(damaged)
    return count
