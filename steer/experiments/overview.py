"""What the log of an experiment holds: its versions, its state, and counts of answers and feedback by arm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine, Integer, and_, case, cast, func, select, true

from steer.experiments.storage import state
from steer.experiments.storage.tables import EXPERIMENTS, EXPOSURES, FEEDBACK
from vectors.errors import UsageError


def version_in(engine: Engine, name: str, version: int | None = None) -> int:
    """The newest version of an experiment, or the given one where it is there. Raises UsageError, SQLAlchemyError."""
    newest = state.version_of(engine, name)
    if newest is None:
        raise UsageError(f"the experiment {name} has not been served yet", "steer serve MODEL --experiment FILE")
    if version is not None and not 1 <= version <= newest:
        raise UsageError(f"the experiment {name} has versions 1 to {newest}, not {version}", "")
    return version or newest


def overview(engine: Engine, name: str, version: int, *, units: bool = True) -> dict[str, Any]:
    """The state of one version, with counts by arm, as JSON values. Raises SQLAlchemyError.

    Without `units` they are not counted, which takes most of the time in a large log.
    """
    now = state.state_of(engine, name, version)
    columns = EXPERIMENTS.c
    with engine.connect() as connection:
        query = select(EXPERIMENTS).where(columns.experiment == name, columns.version == version)
        row = connection.execute(query).mappings().one()
    content: Mapping[str, Any] = json.loads(row["content"])
    steps = [step for step in content["ramp"] if step < content["coverage"]] + [content["coverage"]]
    events = state.events_of(engine, name, version)
    return {
        "experiment": name,
        "version": version,
        "digest": row["digest"],
        "began": row["at"],
        "stage": now.stage,
        "coverage": steps[min(now.stage, len(steps) - 1)],
        "ramping": now.stage < len(steps) - 1,
        "stopped": now.stopped or None,
        "dropped": sum(event["count"] or 0 for event in events if event["kind"] == state.DROPPED),
        "arms": _arms(engine, name, version, [arm["name"] for arm in content["arms"]], units),
        "feedback": _feedback(engine, name),
        "events": [{key: event[key] for key in ("at", "kind", "stage", "count", "reason")} for event in events],
    }


def _arms(engine: Engine, name: str, version: int, names: list[str], units: bool) -> dict[str, dict[str, int]]:
    columns = EXPOSURES.c
    counted = and_(columns.counted == true(), columns.experiment == name)
    one = cast(1, Integer)
    query = (
        select(
            columns.arm,
            func.count().label("answers"),
            func.count(case((counted, one))).label("counted"),
            (func.count(func.distinct(case((counted, columns.unit)))) if units else func.count(0)).label("units"),
            func.count(case((columns.reason == "forced", one))).label("forced"),
            func.count(case((columns.reason == "outside", one))).label("outside"),
            func.count(case((and_(columns.status >= 400, columns.status != 499), one))).label("failed"),
        )
        .where(columns.experiment == name, columns.version == version)
        .group_by(columns.arm)
    )
    with engine.connect() as connection:
        found = {row["arm"]: dict(row) for row in connection.execute(query).mappings()}
    keys = ("answers", "counted", "units", "forced", "outside", "failed")
    return {arm: {key: int(found.get(arm, {}).get(key, 0)) for key in keys} for arm in names}


def _feedback(engine: Engine, name: str) -> dict[str, dict[str, int]]:
    columns = FEEDBACK.c
    query = (
        select(columns.metric, columns.mark, func.count())
        .where(columns.experiment == name)
        .group_by(columns.metric, columns.mark)
    )
    found: dict[str, dict[str, int]] = {}
    with engine.connect() as connection:
        for metric, mark, count in connection.execute(query):
            found.setdefault(metric, {"received": 0, "unknown": 0, "late": 0})
            found[metric]["received"] += count
            if mark in ("unknown", "late"):
                found[metric][mark] += count
    return found
