"""What the log of an experiment holds: its versions, its state, and counts of answers and feedback by arm."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Engine, select

from steer.experiments.storage import state
from steer.experiments.storage.epochs import Epoch, epochs_of
from steer.experiments.storage.figures import Analysis, analysis
from steer.experiments.storage.tables import EXPERIMENTS, FEEDBACK_COUNTS
from vectors.errors import UsageError


def version_in(engine: Engine, name: str, version: int | None = None) -> int:
    """The version that was started last, or the given one where it is there. Raises UsageError, SQLAlchemyError."""
    newest = state.version_of(engine, name)
    if newest is None:
        raise UsageError(f"the experiment {name} has not been served yet", "steer serve MODEL --experiment FILE")
    if version is not None and not 1 <= version <= newest:
        raise UsageError(f"the experiment {name} has versions 1 to {newest}, not {version}", "")
    return version or state.started_last(engine, name) or newest


def overview(engine: Engine, name: str, version: int) -> dict[str, Any]:
    """The state of one version, with counts by arm, as JSON values. Raises SQLAlchemyError."""
    facts = described(engine, name, version)
    with analysis(engine, name, version) as found:
        return {**facts, "arms": counts(found, facts["arms"]), "feedback": _feedback(found.connection, name)}


def described(engine: Engine, name: str, version: int) -> dict[str, Any]:
    """The state of one version as JSON values, with the names of its arms. Raises SQLAlchemyError."""
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
        "arms": [arm["name"] for arm in content["arms"]],
        "allocation": _allocation(engine, name, version, content),
        "judges": _judges(content, events),
        "events": [{key: event[key] for key in ("at", "kind", "stage", "count", "reason")} for event in events],
    }


def _judges(content: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """By judge, why it gave no score, and to at least how many answers of a server."""
    found: dict[str, dict[str, int]] = {judge["name"]: {} for judge in content["judges"]}
    for event in events:
        name, _, reason = event["reason"].partition(": ")
        if event["kind"] == state.UNSCORED and name in found:
            found[name][reason] = max(found[name].get(reason, 0), event["count"] or 0)
    return found


def _allocation(engine: Engine, name: str, version: int, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The latest epoch of adaptive weights; None where the weights stay as they are."""
    if "allocation" not in content:
        return None
    first = Epoch(0, {arm["name"]: arm["weight"] for arm in content["arms"]})
    latest = (epochs_of(engine, name, version) or [first])[-1]
    return {
        "method": content["allocation"]["method"], "epoch": latest.number,
        "weights": {arm: latest.weights[arm] for arm in first.weights},
        "reason": latest.reason, "selected": latest.selected or None, "at": latest.at or None,
    }  # fmt: skip


def counts(found: Analysis, arms: Sequence[str]) -> dict[str, dict[str, int]]:
    """The answers and units of every arm; units that were seen in two arms are those of none."""
    result = {}
    for arm in arms:
        of_arm = [tally for tally in found.tallies if tally.arm == arm]
        result[arm] = {
            "answers": sum(tally.answers for tally in of_arm),
            "counted": sum(tally.answers for tally in of_arm if tally.counted),
            "units": found.units.by_arm.get(arm, 0),
            "forced": sum(tally.answers for tally in of_arm if tally.reason == "forced"),
            "outside": sum(tally.answers for tally in of_arm if tally.reason == "outside"),
            "failed": sum(tally.failed for tally in of_arm),
            "refused": sum(tally.refused for tally in of_arm),
        }
    return result


def _feedback(connection: Connection, name: str) -> dict[str, dict[str, int]]:
    columns = FEEDBACK_COUNTS.c
    query = select(columns.metric, columns.mark, columns.pieces).where(columns.experiment == name, columns.pieces > 0)
    found: dict[str, dict[str, int]] = {}
    for metric, mark, count in connection.execute(query):
        found.setdefault(metric, {"received": 0, "unknown": 0, "late": 0})
        found[metric]["received"] += count
        if mark in ("unknown", "late"):
            found[metric][mark] += count
    return found
