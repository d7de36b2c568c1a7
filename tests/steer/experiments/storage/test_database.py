"""The log in both databases: tables, versions of an experiment, states; and what can't be opened."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy
import trials

from steer.experiments.storage import database, migrations, state
from steer.experiments.storage.database import LogError, engine_of, open_log, shown, write
from steer.experiments.storage.tables import ALL, EVENTS


def test_migrations_make_the_tables_that_are_read(url: str) -> None:
    engine = open_log(url)
    inspected = sqlalchemy.inspect(engine)
    for name, table in ALL.items():
        assert {column["name"] for column in inspected.get_columns(name)} == set(table.columns.keys())
        assert inspected.get_pk_constraint(name)["constrained_columns"] == [c.name for c in table.primary_key]


def test_a_log_is_migrated_once_by_servers_that_start_together(url: str) -> None:
    errors: list[BaseException] = []

    def begin() -> None:
        try:
            open_log(url).dispose()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with open_log(url).connect() as connection:
        numbers = connection.exec_driver_sql("SELECT number FROM migrations").scalars().all()
    assert numbers == list(range(1, len(migrations.MIGRATIONS) + 1))


def test_a_log_opens_while_another_writes_to_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "WAIT", 0.1)
    engine = open_log(url)
    with database.writing(engine) as connection:
        connection.exec_driver_sql("DELETE FROM events")
        with open_log(url).connect() as other:
            assert other.exec_driver_sql("SELECT count(*) FROM exposures").scalar() == 0
    engine.dispose()


def test_files_are_brought_into_wal_mode_in_turn(tmp_path: Path) -> None:
    """A connection that reads keeps others from it for a while, which SQLite itself does not wait for."""
    path = tmp_path / "log.sqlite"
    first = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    first.execute("CREATE TABLE something (x)")
    first.execute("BEGIN IMMEDIATE")
    thread = threading.Timer(0.3, lambda: first.execute("COMMIT"))
    thread.start()
    open_log(f"sqlite:///{path}").dispose()
    thread.join()
    first.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_log_of_a_newer_release_is_refused(url: str) -> None:
    engine = open_log(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO migrations (number, at) VALUES (999, 0)")
    with pytest.raises(migrations.NewerLog, match="newer release"):
        open_log(url)


def test_a_changed_experiment_is_a_new_version(url: str, tmp_path: Path) -> None:
    engine = open_log(url)
    first, second = trials.experiment(tmp_path), trials.experiment(tmp_path, coverage=0.5)
    assert [state.register(engine, e) for e in (first, first, second, first)] == [1, 1, 2, 1]
    assert state.version_of(engine, "tone") == 2
    assert state.version_of(engine, "other") is None


def test_the_log_knows_which_version_was_started_last_also_where_clocks_differ(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_log(url)
    first, second = trials.experiment(tmp_path), trials.experiment(tmp_path, coverage=0.5)
    now = time.time()
    for clock, served, version in ((now, first, 1), (now + 60, second, 2), (now, first, 1), (now - 9, second, 2)):
        monkeypatch.setattr(state.time, "time", lambda clock=clock: clock)
        assert state.register(engine, served) == state.register(engine, served) == version
        assert state.started_last(engine, "tone") == version
    assert [len(state.events_of(engine, "tone", version)) for version in (1, 2)] == [2, 2]  # once for a change
    assert state.started_last(engine, "other") is None


def test_servers_that_register_together_get_one_version(url: str, tmp_path: Path) -> None:
    these, versions = trials.experiment(tmp_path), []
    open_log(url).dispose()
    threads = [threading.Thread(target=lambda: versions.append(state.register(engine_of(url), these))) for _ in "1234"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert versions == [1, 1, 1, 1]


def test_the_state_is_the_latest_stage_and_the_first_stop(url: str) -> None:
    engine = open_log(url)
    assert state.state_of(engine, "tone", 1) == state.State(0, "")
    rows = [state.event("tone", 1, state.STAGE, stage=i) for i in (1, 2)]
    rows += [state.event("tone", 1, state.STOPPED, reason=why) for why in ("refusals", "by hand")]
    write(engine, [("events", row) for row in rows])
    assert state.state_of(engine, "tone", 1) == state.State(2, "refusals")
    assert [event["kind"] for event in state.events_of(engine, "tone", 1)] == ["stage", "stage", "stopped", "stopped"]


def test_a_row_that_arrives_twice_is_written_once(url: str) -> None:
    engine = open_log(url)
    row = state.event("tone", 1, state.STAGE, stage=1)
    write(engine, [("events", row), ("events", row)])
    write(engine, [("events", row)])
    with engine.connect() as connection:
        assert connection.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(EVENTS)).scalar() == 1


@pytest.mark.parametrize("text", ["'); DROP TABLE events; --", "<script>alert(1)</script>", "a\\'b\"c", "Zoë ☃"])
def test_texts_are_data(url: str, text: str) -> None:
    engine = open_log(url)
    write(engine, [("events", state.event(text, 1, state.STOPPED, reason=text))])
    assert state.state_of(engine, text, 1).stopped == text


def test_only_what_begins_a_log_creates_its_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/100% of ä#.db"  # which SQLite would read as an address
    with pytest.raises(database.NoLogFile, match="no such file"):
        open_log(url, create=False)
    with pytest.raises(sqlalchemy.exc.OperationalError, match="unable to open"), engine_of(url).connect():
        pass
    assert list(tmp_path.iterdir()) == []
    open_log(url).dispose()
    open_log(url, create=False).dispose()
    assert [one.name for one in tmp_path.iterdir()] == ["100% of ä#.db"]


def test_a_log_that_is_not_there_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(LogError) as raised:
        open_log("postgresql+psycopg://me:secret@127.0.0.1:1/db")
    assert "postgresql+psycopg://me@127.0.0.1:1/db" in str(raised.value)
    assert "secret" not in str(raised.value)
    with pytest.raises(LogError, match="unable to open"):
        open_log(f"sqlite:///{tmp_path}/missing/log.db")
    with pytest.raises(LogError):
        engine_of("nonsense")
    assert shown("sqlite:////a/b.db") == "sqlite:////a/b.db"
