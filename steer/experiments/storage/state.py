"""The versions of an experiment, and the state of each: its stage of the ramp, and whether it has been stopped."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import IntegrityError

from steer.experiments.specification import Experiment
from steer.experiments.storage.database import insert, writing
from steer.experiments.storage.tables import EVENTS, EXPERIMENTS
from vectors.storage.files import canonical_json

STARTED, STAGE, STOPPED, WARNED, DROPPED, PROMOTED = "started", "stage", "stopped", "warned", "dropped", "promoted"
VALIDATED = "validated"  # a judge, by hand labels


class State(NamedTuple):
    """The state of a version: the stage of its ramp, and why it was stopped (empty while it runs)."""

    stage: int = 0
    stopped: str = ""


def register(engine: Engine, experiment: Experiment) -> int:
    """The version of an experiment in the log, which is a new one for a new digest. Raises SQLAlchemyError."""
    while True:
        known = version_of(engine, experiment.name, experiment.digest)
        if known is not None:
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
                insert(connection, EVENTS, [event(experiment.name, version, STARTED, stage=0)])
            return version
        except IntegrityError:  # another server has registered a version meanwhile
            continue


def version_of(engine: Engine, name: str, digest: str | None = None) -> int | None:
    """The newest version of an experiment in the log, or that with a digest; None where there is none."""
    query = select(func.max(EXPERIMENTS.c.version)).where(EXPERIMENTS.c.experiment == name)
    with engine.connect() as connection:
        return connection.execute(query if digest is None else query.where(EXPERIMENTS.c.digest == digest)).scalar()


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
