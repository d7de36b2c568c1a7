"""The versions of an experiment, and the state of each: its stage of the ramp, and whether it has been stopped.

The newest version need not be the one that runs: a file whose edit is taken back has the digest of an earlier one, and
servers of one log may run different files. So the log notes each start of another version than the one before.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, func, inspect, select
from sqlalchemy.exc import IntegrityError

from steer.experiments.specification import Experiment
from steer.experiments.storage.database import insert, writing
from steer.experiments.storage.tables import EVENTS, EXPERIMENTS
from vectors.storage.files import canonical_json

STARTED, STAGE, STOPPED, WARNED, DROPPED, PROMOTED = "started", "stage", "stopped", "warned", "dropped", "promoted"
VALIDATED = "validated"  # a judge, by hand labels
UNSCORED = "unscored"  # answers by a judge: its name, why, and so far how many
HELD = "held"  # a ramp that has the answers of its stage, and takes no step


class State(NamedTuple):
    """The state of a version: the stage of its ramp, and why it was stopped (empty while it runs)."""

    stage: int = 0
    stopped: str = ""


def register(engine: Engine, experiment: Experiment) -> int:
    """The version of an experiment in the log, which is a new one for a new digest, noted as the one that was started
    last. Raises SQLAlchemyError."""
    while True:
        known = version_of(engine, experiment.name, experiment.digest)
        if known is not None:
            if started_last(engine, experiment.name) != known:
                with writing(engine) as connection:
                    insert(connection, EVENTS, [_start(connection, experiment.name, known)])
            return known
        try:
            with writing(engine) as connection:
                query = select(func.max(EXPERIMENTS.c.version)).where(EXPERIMENTS.c.experiment == experiment.name)
                version = (connection.execute(query).scalar() or 0) + 1
                values = {
                    "experiment": experiment.name, "version": version, "digest": experiment.digest,
                    "content": canonical_json(experiment.frozen()), "at": time.time(),
                }  # fmt: skip
                connection.execute(EXPERIMENTS.insert(), values)
                insert(connection, EVENTS, [_start(connection, experiment.name, version)])
            return version
        except IntegrityError:  # another server has registered a version meanwhile
            continue


def version_of(engine: Engine, name: str, digest: str | None = None) -> int | None:
    """The newest version of an experiment in the log, or that with a digest; None where there is none."""
    query = select(func.max(EXPERIMENTS.c.version)).where(EXPERIMENTS.c.experiment == name)
    with engine.connect() as connection:
        return connection.execute(query if digest is None else query.where(EXPERIMENTS.c.digest == digest)).scalar()


def is_registered(engine: Engine, experiment: Experiment, version: int) -> bool:
    """Whether a log, which may be an empty database, knows an experiment under this version. Raises SQLAlchemyError."""
    with engine.connect() as connection:
        if not inspect(connection).has_table(EXPERIMENTS.name):
            return False
    return version_of(engine, experiment.name, experiment.digest) == version


def started_last(engine: Engine, name: str) -> int | None:
    """The version that a server was started with last, as far as the log knows; None where there is none."""
    query = (
        select(EVENTS.c.version)
        .where(EVENTS.c.experiment == name, EVENTS.c.kind == STARTED)
        .order_by(EVENTS.c.at.desc(), EVENTS.c.version.desc()).limit(1)
    )  # fmt: skip
    with engine.connect() as connection:
        return connection.execute(query).scalar()


def _start(connection: Connection, name: str, version: int) -> Mapping[str, Any]:
    """The event of a start, later than all others in the log: the clocks of servers differ."""
    query = select(func.max(EVENTS.c.at)).where(EVENTS.c.experiment == name, EVENTS.c.kind == STARTED)
    started = event(name, version, STARTED, stage=0)
    return {**started, "at": max(started["at"], (connection.execute(query).scalar() or 0.0) + 0.001)}


def stop(engine: Engine, name: str, reason: str) -> list[int]:
    """Stop every version that is not stopped yet, since any of them may be running; return which these are.

    Raises SQLAlchemyError.
    """
    columns = EVENTS.c
    stopped = select(columns.version).where(columns.experiment == name, columns.kind == STOPPED)
    going = select(EXPERIMENTS.c.version).where(
        EXPERIMENTS.c.experiment == name, EXPERIMENTS.c.version.not_in(stopped)
    )  # fmt: skip
    with writing(engine) as connection:
        versions = list(connection.execute(going.order_by(EXPERIMENTS.c.version)).scalars())
        insert(connection, EVENTS, [event(name, version, STOPPED, reason=reason) for version in versions])
    return versions


def state_of(engine: Engine, name: str, version: int) -> State:
    """The state of a version, which is that of its latest stage and of the first stop."""
    query = (
        select(EVENTS.c.kind, EVENTS.c.stage, EVENTS.c.reason)
        .where(EVENTS.c.experiment == name, EVENTS.c.version == version, EVENTS.c.kind.in_((STAGE, STOPPED)))
        .order_by(EVENTS.c.at)
    )
    state = State()
    with engine.connect() as connection:
        for kind, stage, reason in connection.execute(query):
            if kind == STAGE:
                state = state._replace(stage=max(state.stage, stage or 0))
            elif not state.stopped:
                state = state._replace(stopped=reason or "stopped")
    return state


def events_of(engine: Engine, name: str, version: int) -> list[dict[str, Any]]:
    """Everything that happened to a version, in order."""
    query = select(EVENTS).where(EVENTS.c.experiment == name, EVENTS.c.version == version).order_by(EVENTS.c.at)
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def event(name: str, version: int, kind: str, *, reason: str = "", stage: int | None = None, count: int | None = None
          ) -> Mapping[str, Any]:  # fmt: skip
    """A row of `events` that happens now."""
    return {
        "id": uuid.uuid4().hex, "experiment": name, "version": version, "kind": kind, "stage": stage,
        "count": count, "reason": reason, "at": time.time(),
    }  # fmt: skip
