"""The writer: batches in both databases, a database that goes away and comes back, bounded memory, refused rows."""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import postgres
import pytest
import sqlalchemy
import trials
from sqlalchemy import Engine, func, select

from steer.experiments.assignment import Identity
from steer.experiments.running import live
from steer.experiments.storage import state
from steer.experiments.storage import writer as writers
from steer.experiments.storage.database import engine_of, open_log
from steer.experiments.storage.journal import Row
from steer.experiments.storage.tables import EVENTS, EXPOSURES
from steer.experiments.storage.writer import Writer, recover, written

MEASURED = {"status": 200, "at": 1.0, "response_tokens": 20, "latency": 0.5, "repetition": 0.0, "refusal": False}


def event(number: int, **more: Any) -> dict[str, Any]:
    return {**state.event("tone", 1, state.WARNED, reason=str(number)), "id": str(number), **more}


def count(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(EVENTS)).scalar_one()


def answers(url: str) -> int:
    """How many answers the file has that stands at this address."""
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        return int(connection.execute("SELECT count(*) FROM exposures").fetchone()[0])


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_rows_reach_the_database(url: str, tmp_path: Path) -> None:
    engine = open_log(url)
    writer = Writer(engine, tmp_path)
    assert {writer.add("events", event(i)) for i in range(2500)} == {"disk"}
    assert writer.flush(20)
    assert count(engine) == 2500
    assert writer.state() == (0, 0, "")
    assert writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_no_database_takes_is_dropped_alone(url: str, tmp_path: Path) -> None:
    engine = open_log(url)
    writer = Writer(engine, tmp_path)
    writer.add("events", event(1))
    writer.add("events", event(2, stage="no number" if "postgres" in url else [1, 2]))
    writer.add("events", event(3, experiment=None))
    writer.add("nothing", {"id": "4"})
    writer.add("events", event(5))
    assert writer.flush(20)
    assert (count(engine), writer.dropped) == (2, 3)
    writer.close()


def test_a_number_that_no_database_takes_ends_nothing(url: str, tmp_path: Path) -> None:
    engine = open_log(url)
    writer = Writer(engine, tmp_path)
    for number in range(3):
        writer.add("events", event(number, count=2**70 if number == 1 else None))
    assert writer.flush(10)
    assert (count(engine), writer.state().dropped) == (2, 1)
    writer.close()


def test_an_entry_that_no_index_takes_blocks_neither_the_writer_nor_a_restart(
    postgresql: postgres.Server, tmp_path: Path
) -> None:
    """PostgreSQL calls it an operational error, as it does a connection that is lost."""
    log = trials.Log(tmp_path, postgresql.new_log())
    longest = secrets.token_hex(5000)  # which compression makes no smaller than the limit
    rows = [log.answer("control", f"u{i}", longest if i == 1 else f"r{i}") for i in range(3)]
    writer = Writer(log.engine, tmp_path / "journal")
    for row in rows:
        writer.add("exposures", row)
    assert writer.flush(20)
    assert (writer.dropped, writer.away) == (1, "")
    writer.close()
    gone = Writer(engine_of("postgresql+psycopg://nobody@127.0.0.1:1/nothing"), tmp_path / "journal")
    gone.add("exposures", {**rows[1], "id": "1"})
    gone.add("exposures", {**rows[2], "id": "2"})
    assert gone.close(0.1)
    damaged: list[int] = []
    assert (recover(log.engine, tmp_path / "journal", damaged.append), damaged) == (2, [1])
    with log.engine.connect() as connection:
        assert sorted(connection.execute(select(EXPOSURES.c.response)).scalars()) == ["r0", "r2", "r2"]


def test_rows_wait_while_the_database_refuses_all(url: str, tmp_path: Path) -> None:
    """Tables that are away, rights that are taken, a file that is no database: nothing is lost for it."""
    log = trials.Log(tmp_path, url)
    rows = [("exposures", log.answer("control", f"u{i}")) for i in range(2)]
    if "postgres" in url:
        refusals = [
            "SET default_transaction_read_only = on",
            "SET ROLE pg_read_all_data",
            "ALTER TABLE units RENAME TO u",
        ]
    else:
        refusals = ["PRAGMA query_only = on", "ALTER TABLE units RENAME TO u"]
    for refusal in refusals:
        with log.engine.connect() as connection:
            connection.exec_driver_sql(refusal)
            connection.commit()
        with pytest.raises(sqlalchemy.exc.SQLAlchemyError):
            written(log.engine, rows)
        if "ALTER" not in refusal:
            log.engine.dispose()
    with log.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE u RENAME TO units")
    assert written(log.engine, rows) == 0


def test_a_failure_of_any_kind_is_shown_and_the_writer_goes_on(tmp_path: Path) -> None:
    writer = Writer(open_log(f"sqlite:///{tmp_path}/log.db"), tmp_path / "journal")
    journal, writer.journal = writer.journal, None  # type: ignore[assignment]
    until(lambda: "NoneType" in writer.away)
    writer.journal = journal
    writer.add("events", event(1))
    assert writer.flush(10)
    writer.close()


@pytest.mark.parametrize("text", ["null \0 byte", "half \ud83d a character", "'; DROP TABLE events; --"])
def test_any_text_of_a_client_can_be_stored(url: str, tmp_path: Path, text: str) -> None:
    engine = open_log(url)
    writer = Writer(engine, tmp_path)
    writer.add("events", event(1, reason=text))
    assert writer.flush(20)
    assert (count(engine), writer.dropped) == (1, 0)
    writer.close()


def test_memory_is_bounded_where_the_journal_fails_too(tmp_path: Path) -> None:
    engine = engine_of("postgresql+psycopg://nobody@127.0.0.1:1/nothing")
    writer = Writer(engine, tmp_path, waiting=10, largest=0)
    assert [writer.add("events", event(i)) for i in range(25)] == ["memory"] * 10 + ["dropped"] * 15
    assert (writer.state().waiting, writer.dropped) == (10, 15)
    until(lambda: bool(writer.state().away))
    assert not writer.close(0.2)


def test_what_a_killed_server_left_is_taken_once(url: str, tmp_path: Path) -> None:
    gone = Writer(engine_of("postgresql+psycopg://nobody@127.0.0.1:1/nothing"), tmp_path)
    for i in range(30):
        assert gone.add("events", event(i)) == "disk"
    assert gone.close(0.1)
    engine = open_log(url)
    assert recover(engine, tmp_path) == 30
    assert recover(engine, tmp_path) == 0
    assert count(engine) == 30


def test_a_postgresql_that_is_killed_and_comes_back_loses_and_doubles_nothing(tmp_path: Path) -> None:
    with postgres.running() as server:
        engine = open_log(server.new_log())
        writer = Writer(engine, tmp_path)
        for i in range(600):
            writer.add("events", event(i))
            if i == 200:
                server.kill()
            if i == 400:
                until(lambda: bool(writer.state().away))
                server.start()
            time.sleep(0.001)
        until(lambda: writer.state().waiting == 0)
        assert (count(engine), writer.dropped) == (600, 0)
        writer.close()


def test_a_locked_sqlite_file_is_waited_for(tmp_path: Path) -> None:
    engine = open_log(f"sqlite:///{tmp_path}/log.db")
    writer = Writer(engine, tmp_path / "journal")
    other = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/log.db").raw_connection()
    other.execute("BEGIN IMMEDIATE")  # type: ignore[attr-defined]
    began = time.monotonic()
    assert {writer.add("events", event(i)) for i in range(50)} == {"disk"}
    assert time.monotonic() - began < 3  # adding does not wait; the database would for 5 seconds
    assert not writer.flush(0.3)
    other.rollback()
    assert writer.flush(20)
    assert count(engine) == 50
    writer.close()
    other.close()


def test_only_columns_of_the_table_are_written(tmp_path: Path) -> None:
    engine = open_log(f"sqlite:///{tmp_path}/log.db")
    writer = Writer(engine, tmp_path / "journal")
    values = {"id": "1", "experiment": "tone", "version": 1, "arm": "a", "reason": "assigned", "stage": 0, "at": 1.0,
              "counted": True, "unit": "u", "unit_source": "user", "conversation": "c", "digest": "d", "status": 200,
              "an unknown column": 1}  # fmt: skip
    writer.add("exposures", values)
    assert writer.flush(20)
    with engine.connect() as connection:
        assert connection.execute(select(EXPOSURES.c.arm)).scalars().all() == ["a"]
    writer.close()


def test_an_event_waits_for_no_other_rows_and_takes_those_that_wait_along(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a stop reaches other servers at once."""
    monkeypatch.setattr(writers, "INTERVAL", 3600.0)
    engine = open_log(url)
    writer = Writer(engine, tmp_path)
    rated = {"id": "1", "experiment": "tone", "metric": "thumbs", "value": 1.0, "source": "user", "mark": "", "at": 0.0}
    writer.add("feedback", rated)
    assert (count(engine), writer.state().waiting) == (0, 1)
    writer.add("events", event(1))
    until(lambda: writer.state().waiting == 0)
    assert count(engine) == 1
    writer.close()


def test_rows_wait_while_the_file_of_the_log_is_away_and_are_written_once_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = trials.Log(tmp_path, f"sqlite:///{tmp_path}/tone.db")
    writer = Writer(log.engine, tmp_path / "journal", lambda: state.is_registered(log.engine, log.experiment, 1))
    writer.add("exposures", log.answer("control", "u1"))
    assert writer.flush(10)
    (tmp_path / "tone.db").rename(tmp_path / "away.db")
    for number in range(3):
        writer.add("exposures", log.answer("control", f"away {number}"))
    until(lambda: bool(writer.away))
    assert not writer.flush(1.5)
    assert (writer.state().waiting, writer.dropped) == (3, 0)
    assert writer.away.startswith("tone.db is not there any more: put it back")
    assert not (tmp_path / "tone.db").exists()
    (tmp_path / "away.db").rename(tmp_path / "tone.db")
    assert writer.flush(10)
    until(lambda: not writer.away)
    assert answers(log.experiment.log) == 4
    assert [record.message.split(": ")[0].split(".db ")[1] for record in caplog.records] == [
        "is away, and rows wait in the journal", "is back, and has the rows that waited",
    ]  # fmt: skip
    writer.close()


def test_a_file_that_goes_away_is_noticed_without_any_rows(tmp_path: Path) -> None:
    writer = Writer(open_log(f"sqlite:///{tmp_path}/log.db"), tmp_path / "journal")
    for file in tmp_path.glob("log.db*"):
        file.unlink()
    until(lambda: "log.db is not there any more" in writer.away)
    writer.close()


@pytest.mark.parametrize("empty", [True, False], ids=["an empty file", "a log of nothing"])
def test_a_file_without_the_version_that_is_served_gets_no_rows_before_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, empty: bool
) -> None:
    """Its stages, its stops and its epochs are not there, and its version of this number may be another one."""
    running = live.begin(trials.experiment(tmp_path, log="tone.db"))
    running.start()
    for file in tmp_path.glob("tone.db*"):
        file.unlink()
    if empty:
        (tmp_path / "tone.db").touch()
    else:
        open_log(running.experiment.log).dispose()
    running.record(running.decide(Identity("c", "conversation", "c", True)), MEASURED)
    until(lambda: "tone.db is another file" in running.writer.away)
    assert not running.writer.flush(1.5)
    assert running.writer.state()[:2] == (1, 0)
    running.end()
    with contextlib.closing(sqlite3.connect(tmp_path / "tone.db")) as connection:
        assert empty == (connection.execute("SELECT name FROM sqlite_master").fetchall() == [])
    assert "a check failed" not in caplog.text
    again = live.begin(running.experiment)
    assert (again.version, answers(running.experiment.log)) == (1, 1)
    again.end()


def test_a_copy_of_the_log_in_its_place_gets_the_rows(tmp_path: Path) -> None:
    running = live.begin(trials.experiment(tmp_path, log="tone.db"))
    running.writer.flush(10)
    backup = sqlite3.connect(tmp_path / "backup.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "tone.db")) as log:
        log.backup(backup)
    backup.close()
    for file in tmp_path.glob("tone.db*"):
        file.unlink()
    (tmp_path / "backup.db").rename(tmp_path / "tone.db")
    running.record(running.decide(Identity("c", "conversation", "c", True)), MEASURED)
    assert running.writer.flush(10)
    assert answers(running.experiment.log) == 1
    running.end()


def test_rows_that_were_written_while_the_file_was_replaced_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_log(f"sqlite:///{tmp_path}/log.db")
    writer = Writer(engine, tmp_path / "journal")

    def replaced(engine: Engine, rows: Sequence[Row]) -> int:
        count = written(engine, rows)
        monkeypatch.undo()
        for file in tmp_path.glob("log.db*"):
            file.unlink()
        open_log(f"sqlite:///{tmp_path}/log.db").dispose()
        return count

    monkeypatch.setattr(writers, "written", replaced)
    writer.add("events", event(1))
    assert writer.flush(10)
    assert count(open_log(f"sqlite:///{tmp_path}/log.db")) == 1
    writer.close()
