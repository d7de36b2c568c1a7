"""Numbered migrations: each takes a log from one number to the next, once, and is never changed after a release.

The statements are SQL that SQLite and PostgreSQL both read.
"""

from __future__ import annotations

import time
from typing import Any

from vectors.errors import SteerError

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
)


class NewerLog(SteerError):
    """A log that a newer release of steer has made."""


def migrate(connection: Any) -> int:
    """Bring a log up to date inside the open transaction; return its number. Raises NewerLog.

    `connection` is SQLAlchemy's; its transaction must exclude other writers.
    """
    connection.exec_driver_sql(
        "CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY, at DOUBLE PRECISION NOT NULL)"
    )
    applied = connection.exec_driver_sql("SELECT max(number) FROM migrations").scalar() or 0
    if applied > len(MIGRATIONS):
        raise NewerLog(
            f"the log was made by a newer release of steer: its number is {applied}, not at most {len(MIGRATIONS)}",
            "use that release, or another log",
        )
    for number, statements in enumerate(MIGRATIONS[applied:], applied + 1):
        for statement in statements:
            connection.exec_driver_sql(statement)
        connection.exec_driver_sql(f"INSERT INTO migrations (number, at) VALUES ({number}, {time.time()})")
    return len(MIGRATIONS)
