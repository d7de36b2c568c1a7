"""Numbered migrations: each takes a log from one number to the next, once, and is never changed after a release.

The statements are SQL that SQLite and PostgreSQL both read.
"""

from __future__ import annotations

import time
from typing import Any

from vectors.errors import SteerError

_SUMMED = ("response_tokens", "ttft", "inter_token", "latency", "repetition", "refusal", "characters")

MIGRATED = "migrations"  # the table of the numbers of migrations that a log has had

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE experiments (experiment TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, "
        "content TEXT NOT NULL, at DOUBLE PRECISION NOT NULL, PRIMARY KEY (experiment, version), "
        "UNIQUE (experiment, digest))",
        "CREATE TABLE exposures (id TEXT PRIMARY KEY, experiment TEXT NOT NULL, version INTEGER NOT NULL, "
        "arm TEXT NOT NULL, reason TEXT NOT NULL, stage INTEGER NOT NULL, counted BOOLEAN NOT NULL, "
        "at DOUBLE PRECISION NOT NULL, unit TEXT NOT NULL, unit_source TEXT NOT NULL, conversation TEXT NOT NULL, "
        "response TEXT, digest TEXT NOT NULL, composition TEXT, status INTEGER NOT NULL, answers INTEGER, "
        "prompt_tokens INTEGER, cached_tokens INTEGER, response_tokens INTEGER, ttft DOUBLE PRECISION, "
        "inter_token DOUBLE PRECISION, latency DOUBLE PRECISION, stop TEXT, weight_version TEXT, gates TEXT, "
        "characters INTEGER, repetition DOUBLE PRECISION, refusal BOOLEAN, trace TEXT, prompt TEXT, answer TEXT)",
        "CREATE INDEX exposures_by_version ON exposures (experiment, version, at)",
        "CREATE INDEX exposures_by_response ON exposures (response)",
        "CREATE INDEX exposures_by_unit ON exposures (unit)",
        "CREATE INDEX exposures_by_conversation ON exposures (conversation)",
        "CREATE TABLE feedback (id TEXT PRIMARY KEY, experiment TEXT NOT NULL, version INTEGER, response TEXT, "
        "conversation TEXT, metric TEXT NOT NULL, value DOUBLE PRECISION, comment TEXT, demonstration TEXT, "
        "prompt TEXT, source TEXT NOT NULL, mark TEXT NOT NULL, at DOUBLE PRECISION NOT NULL)",
        "CREATE INDEX feedback_by_metric ON feedback (experiment, metric, at)",
        "CREATE INDEX feedback_by_response ON feedback (response)",
        "CREATE TABLE events (id TEXT PRIMARY KEY, experiment TEXT NOT NULL, version INTEGER NOT NULL, "
        "kind TEXT NOT NULL, stage INTEGER, count INTEGER, reason TEXT NOT NULL, at DOUBLE PRECISION NOT NULL)",
        "CREATE INDEX events_by_version ON events (experiment, version, at)",
    ),
    (  # what the answers add up to; the answers of a log from before are added up when they are first read
        "CREATE TABLE units (experiment TEXT NOT NULL, version INTEGER NOT NULL, unit TEXT NOT NULL, "
        "arm TEXT NOT NULL, arms INTEGER NOT NULL, first DOUBLE PRECISION NOT NULL, "
        + "".join(f"{kind}_{name} DOUBLE PRECISION NOT NULL, " for name in _SUMMED for kind in ("y", "x"))
        + "PRIMARY KEY (experiment, version, unit))",
        "CREATE TABLE unit_sums (experiment TEXT NOT NULL, version INTEGER NOT NULL, metric TEXT NOT NULL, "
        "arm TEXT NOT NULL, slot INTEGER NOT NULL, units INTEGER NOT NULL, "
        + "".join(
            f"{name} DOUBLE PRECISION NOT NULL, " for name in ("mean", "mean_squared", "y", "yy", "x", "xx", "xy")
        )
        + "PRIMARY KEY (experiment, version, metric, arm, slot))",
        "CREATE TABLE slot_origins (experiment TEXT NOT NULL, version INTEGER NOT NULL, at DOUBLE PRECISION NOT NULL, "
        "PRIMARY KEY (experiment, version))",
        "CREATE TABLE tallies (experiment TEXT NOT NULL, version INTEGER NOT NULL, arm TEXT NOT NULL, "
        "reason TEXT NOT NULL, counted BOOLEAN NOT NULL, first DOUBLE PRECISION NOT NULL, "
        "last DOUBLE PRECISION NOT NULL, answers INTEGER NOT NULL, failed INTEGER NOT NULL, gone INTEGER NOT NULL, "
        "refusals INTEGER NOT NULL, "
        + "".join(
            f"{name}_count INTEGER NOT NULL, {name}_sum DOUBLE PRECISION NOT NULL, "
            f"{name}_squares DOUBLE PRECISION NOT NULL, "
            for name in ("tokens", "repetition")
        )
        + "PRIMARY KEY (experiment, version, arm, reason, counted))",
    ),
    (  # requests that were refused counted as failed; what the answers add up to is added up anew when it is read
        "ALTER TABLE tallies ADD COLUMN refused INTEGER NOT NULL DEFAULT 0",
        "DELETE FROM tallies",
    ),
    (  # what feedback adds up to; that of a log from before is added up when it is first read
        "CREATE TABLE ratings (experiment TEXT NOT NULL, about TEXT NOT NULL, version INTEGER NOT NULL, "
        "metric TEXT NOT NULL, unit TEXT NOT NULL, value DOUBLE PRECISION NOT NULL, "
        "PRIMARY KEY (experiment, about, version, metric))",
        "CREATE TABLE unit_ratings (experiment TEXT NOT NULL, version INTEGER NOT NULL, unit TEXT NOT NULL, "
        "metric TEXT NOT NULL, y DOUBLE PRECISION NOT NULL, x DOUBLE PRECISION NOT NULL, "
        "PRIMARY KEY (experiment, version, unit, metric))",
        "CREATE TABLE feedback_counts (experiment TEXT NOT NULL, metric TEXT NOT NULL, mark TEXT NOT NULL, "
        "pieces INTEGER NOT NULL, PRIMARY KEY (experiment, metric, mark))",
        "CREATE INDEX feedback_by_conversation ON feedback (conversation)",
    ),
    (  # adaptive weights
        "CREATE TABLE epochs (experiment TEXT NOT NULL, version INTEGER NOT NULL, epoch INTEGER NOT NULL, "
        "weights TEXT NOT NULL, reason TEXT NOT NULL, selected TEXT NOT NULL, at DOUBLE PRECISION NOT NULL, "
        "PRIMARY KEY (experiment, version, epoch))",
        "ALTER TABLE exposures ADD COLUMN epoch INTEGER",
        "ALTER TABLE units ADD COLUMN epoch INTEGER",
    ),
    ("CREATE INDEX exposures_outside ON exposures (experiment, unit) WHERE reason = 'outside'",),
    ("DELETE FROM tallies",),  # sums are by the size of a unit's value; they are added up anew when they are read
    (  # with all that CUPED reads of an answer, so that the rows themselves, far apart in a large log, are not read
        "DROP INDEX exposures_outside",
        f"CREATE INDEX exposures_outside ON exposures (experiment, unit, at, status, {', '.join(_SUMMED)}, reason) "
        "WHERE reason = 'outside'",
    ),
)


class NewerLog(SteerError):
    """A log that a newer release of steer has made."""


def migrate(connection: Any) -> int:
    """Bring a log up to date inside the open transaction; return its number. Raises NewerLog.

    `connection` is SQLAlchemy's; its transaction must exclude other writers.
    """
    connection.exec_driver_sql(
        f"CREATE TABLE IF NOT EXISTS {MIGRATED} (number INTEGER PRIMARY KEY, at DOUBLE PRECISION NOT NULL)"
    )
    for number in pending(connection):
        for statement in MIGRATIONS[number - 1]:
            connection.exec_driver_sql(statement)
        connection.exec_driver_sql(f"INSERT INTO {MIGRATED} (number, at) VALUES ({number}, {time.time()})")
    return len(MIGRATIONS)


def pending(connection: Any) -> range:
    """The numbers of the migrations that a log with the table of migrations has not had. Raises NewerLog."""
    applied = connection.exec_driver_sql(f"SELECT max(number) FROM {MIGRATED}").scalar() or 0
    if applied > len(MIGRATIONS):
        raise NewerLog(
            f"the log was made by a newer release of steer: its number is {applied}, not at most {len(MIGRATIONS)}",
            "use that release, or another log",
        )
    return range(applied + 1, len(MIGRATIONS) + 1)
