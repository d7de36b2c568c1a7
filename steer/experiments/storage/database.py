"""Opening, reading and writing a log, which is a SQLite file in WAL mode or a PostgreSQL database."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, Engine, Table, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    InterfaceError,
    ProgrammingError,
    SQLAlchemyError,
    StatementError,
)

from steer.experiments.storage import forgetting, ratings, sums
from steer.experiments.storage.migrations import MIGRATED, migrate, pending
from steer.experiments.storage.tables import ALL, EXPOSURES, FEEDBACK
from vectors.errors import SteerError

INSTRUCTIONS = 1_000_000  # of SQLite, about 20 ms, after which signals are handled
WAIT = 5  # seconds for a lock, and for a connection
_OPENED = "file"  # key of what a connection has open
_PARAMETERS = 500  # of one statement, which some builds of SQLite allow 999 of
_MIGRATING = 0x73746565_72616262 & 0x7FFFFFFF_FFFFFFFF  # key of the lock of PostgreSQL under which a log is migrated


class LogError(SteerError):
    """A log that can't be opened, read or written."""


class NoLogFile(LogError):
    """A log whose SQLite file is not there, so that nothing has been written to it yet, or it has been moved away."""

    def __init__(self, file: Path) -> None:
        super().__init__(f"the log {file} can't be opened: there is no such file", "check the log's address")
        self.file = file


def engine_of(url: str) -> Engine:
    """An engine for the log at a URL, which is not opened yet; it never creates a SQLite file. Raises LogError for a
    URL that is none."""
    try:
        made = sqlalchemy.engine.make_url(url)
        lite = made.get_backend_name() == "sqlite"
        # A server that has vanished without a word is noticed: by what it does not acknowledge, and by silence.
        lost = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 20_000}
        arguments: dict[str, Any] = {"timeout": WAIT} if lite else {"connect_timeout": WAIT, **lost}
        engine = sqlalchemy.create_engine(made, connect_args=arguments, pool_pre_ping=not lite)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        raise LogError(f"the log {shown(url)} can't be opened: {error}", "write a file, or postgresql://…") from error
    if lite:
        event.listen(engine, "do_connect", _connect_to_existing)
        event.listen(engine, "connect", _prepare)
        event.listen(engine, "checkout", _require_unmoved)
        event.listen(engine, "begin", _begin)
    return engine


def file_of(engine: Engine) -> Path | None:
    """The file of a log in SQLite; None for one in PostgreSQL."""
    return None if engine.dialect.name != "sqlite" else Path(str(engine.url.database)).absolute()


def _connect_to_existing(dialect: Any, record: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
    """A new connection to a SQLite file that is there. SQLite by itself would make an empty one in its place."""
    file = Path(arguments[0]).absolute()
    record.info[_OPENED] = file, identity_of(file)  # before it is opened, so that no later file passes for it
    return dialect.connect(f"{file.as_uri()}?mode=rw", uri=True, **options)


def identity_of(file: Path) -> tuple[int, int] | None:
    """What a path names now: the device and the inode of its file; None where there is none that can be seen."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _require_unmoved(_connection: Any, record: Any, _proxy: Any) -> None:
    """Let nobody use a connection to a file that its path does not name any more: what is written there is lost."""
    file, opened = record.info[_OPENED]
    if opened is None or identity_of(file) != opened:
        raise DisconnectionError(f"{file} is another file than before")  # the pool opens the one that is there, if any


def _prepare(connection: sqlite3.Connection, _record: Any) -> None:
    """Settings of a new SQLite connection: transactions begin where SQLAlchemy begins them, and commits are durable."""
    connection.isolation_level = None
    connection.set_progress_handler(_go_on, INSTRUCTIONS)
    connection.execute(f"PRAGMA busy_timeout={WAIT * 1000}")
    _write_ahead(connection)
    connection.execute("PRAGMA synchronous=FULL")


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Bring the file into WAL mode. SQLite does not wait here for others that do the same, whatever the timeout."""
    end = time.monotonic() + WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
        time.sleep(0.01)


def _go_on() -> int:
    """Called while SQLite works, since signal handlers run in Python code only. One that raises ends the statement,
    with the error "interrupted" instead of its own."""
    return 0


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.info.get("writing") else "BEGIN")


def open_log(url: str, *, create: bool = True) -> Engine:
    """An engine for the log at a URL, with all tables. A SQLite file that is not there is begun where `create` says so,
    as it does for a server. Raises LogError, NewerLog, and NoLogFile where nothing is to be created."""
    engine = engine_of(url)
    file = file_of(engine)
    if file is not None and _missing(file):
        if not create:
            raise NoLogFile(file)
        with contextlib.suppress(OSError):  # SQLite says what is wrong with the place
            file.touch(0o644)
    try:
        prepare(engine)
    except SQLAlchemyError as error:
        engine.dispose()
        raise LogError(
            f"the log {shown(url)} can't be opened: {reason_of(error)}", "check the log's address"
        ) from error
    return engine


def _missing(file: Path) -> bool:
    """Whether there is no such file, as far as one may look; of all else that is wrong with it, SQLite says what."""
    try:
        file.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def prepare(engine: Engine) -> None:
    """Create or update the tables; nothing waits for a lock where they are up to date. Raises SQLAlchemyError,
    NewerLog."""
    with engine.connect() as connection:
        if sqlalchemy.inspect(connection).has_table(MIGRATED) and not pending(connection):
            return
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATING})")
        migrate(connection)


@contextlib.contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A context with a transaction that writes. SQLite takes its lock at the beginning, where it waits for others."""
    with engine.connect() as connection:
        connection.info["writing"] = True
        try:
            with connection.begin():
                yield connection
        finally:
            connection.info.pop("writing", None)


def insert(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows into a table; those whose id is there already are left out. Answers and feedback are added up."""
    if not rows:
        return
    if table in (EXPOSURES, FEEDBACK):
        new = _insert_new(connection, table, rows)
        (sums if table is EXPOSURES else ratings).add(connection, new)
        return
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    whole = [{column.name: row.get(column.name) for column in table.columns} for row in rows]
    connection.execute(dialect.insert(table).on_conflict_do_nothing(), whole)


def _insert_new(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Insert rows, and return those whose id was not there. Of one id, the first row is written."""
    by_id: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        by_id.setdefault(row["id"], row)
    if connection.dialect.name == "postgresql":
        whole = [{column.name: row.get(column.name) for column in table.columns} for row in by_id.values()]
        statement = postgresql.insert(table).on_conflict_do_nothing().returning(table.c.id)
        return [by_id[name] for name in connection.execute(statement, whole).scalars()]
    # One transaction of SQLite writes at a time, so what is not there now is new.
    ids = list(by_id)
    for start in range(0, len(ids), _PARAMETERS):
        these = ids[start : start + _PARAMETERS]
        query = f"SELECT id FROM {table.name} WHERE id IN ({','.join('?' * len(these))})"
        for name in connection.exec_driver_sql(query, tuple(these)).scalars().all():
            del by_id[name]
    if by_id:
        names = table.columns.keys()
        statement = f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({','.join('?' * len(names))})"
        connection.exec_driver_sql(statement, [tuple(map(row.get, names)) for row in by_id.values()])
    return list(by_id.values())


def write(engine: Engine, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Write rows, given with the names of their tables, in one transaction; those of units that are forgotten are left
    out. Raises SQLAlchemyError."""
    with writing(engine) as connection:
        forgetting.lock(connection, "writing")
        by_table: dict[str, list[Mapping[str, Any]]] = {}
        for name, row in forgetting.remembered(connection, list(rows)):
            by_table.setdefault(name, []).append(row)
        if not by_table.keys().isdisjoint((EXPOSURES.name, FEEDBACK.name)):
            sums.lock(connection)
        for name, found in by_table.items():
            insert(connection, ALL[name], found)


def interrupted(error: BaseException) -> bool:
    """Whether a signal has ended a statement."""
    return reason_of(error) == "interrupted"


# What PostgreSQL says of values: cardinality, data, integrity, a view's check, limits (such as that of an entry of an
# index); and the two codes of values of another type. All else is about the database: a connection, memory, space,
# rights, tables that are not there, locks.
_OF_ROWS = ("21", "22", "23", "44", "54", "42804", "42846")


def about_the_rows(error: BaseException) -> bool:
    """Whether a database has refused rows for their values, so that it would refuse them again, and take others.

    An error that is not known counts as one of the database: rows that wait are not lost.
    """
    if not isinstance(error, DBAPIError):  # raised before the database is asked: a value that has no form for it
        return isinstance(error, OverflowError | StatementError)
    if error.connection_invalidated:
        return False
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return bool(state.startswith(_OF_ROWS))
    if isinstance(error.orig, sqlite3.Error):  # by the driver's names: IntegrityError, DataError (too big), and others
        return isinstance(error, IntegrityError | DataError | ProgrammingError | InterfaceError)
    return isinstance(error, DataError | ProgrammingError)  # psycopg, of a value that it can't send


def shown(url: str) -> str:
    """The URL of a log without its password."""
    head, at, tail = url.rpartition("@")
    scheme, slashes, account = head.partition("://")
    return f"{scheme}{slashes}{account.partition(':')[0]}{at}{tail}" if at else url


def reason_of(error: BaseException) -> str:
    """The first line of a database's error, without the statement."""
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0][:300]
