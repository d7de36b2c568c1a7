"""Sums over the units of an experiment, which the database adds up: what the statistics read of it.

Only answers that count are read (assigned, not during the ramp). Units that were seen in two arms are left out and
counted. A unit's value is the mean over its answers, or over the feedback about them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Engine, Float, and_, case, cast, func, or_, select, true
from sqlalchemy.sql.selectable import Subquery

from steer.experiments.specification import Metric
from steer.experiments.statistics.moments import Sums
from steer.experiments.storage.tables import EXPOSURES, FEEDBACK


class Units(NamedTuple):
    """The units of each arm, and how many others were seen in two arms."""

    by_arm: dict[str, int]
    moved: int


def _counted(experiment: str, version: int) -> ColumnElement[bool]:
    columns = EXPOSURES.c
    return and_(columns.experiment == experiment, columns.version == version, columns.counted == true())


def _units(experiment: str, version: int) -> Subquery:
    """The units of the analysis with their arm; `arms` is 2 for one that was seen in several."""
    columns = EXPOSURES.c
    several = case((func.min(columns.arm) != func.max(columns.arm), 2), else_=1)
    query = select(columns.unit, func.min(columns.arm).label("arm"), several.label("arms"))
    return query.where(_counted(experiment, version)).group_by(columns.unit).subquery()


def units(engine: Engine, experiment: str, version: int) -> Units:
    """The number of units of each arm. Raises SQLAlchemyError."""
    each = _units(experiment, version)
    query = select(each.c.arm, each.c.arms, func.count()).group_by(each.c.arm, each.c.arms)
    by_arm: dict[str, int] = {}
    moved = 0
    with engine.connect() as connection:
        for arm, arms, count in connection.execute(query):
            if arms == 1:
                by_arm[arm] = count
            else:
                moved += count
    return Units(by_arm, moved)


def sums(engine: Engine, experiment: str, version: int, metric: Metric) -> dict[str, Sums]:
    """The sums of a metric over the units of each arm that have a value of it. Raises SQLAlchemyError."""
    each = _units(experiment, version)
    read = _server_values if metric.source == "server" else _feedback_values
    values = read(experiment, version, metric.name)
    value = values.c.value
    query = (
        select(each.c.arm, func.count(), func.sum(value), func.sum(value * value))
        .join(values, values.c.unit == each.c.unit).where(each.c.arms == 1).group_by(each.c.arm)
    )  # fmt: skip
    with engine.connect() as connection:
        return {arm: Sums(count, float(y), float(yy)) for arm, count, y, yy in connection.execute(query)}


def _server_values(experiment: str, version: int, name: str) -> Subquery:
    columns = EXPOSURES.c
    column: Any = columns[name]
    number = case((column, 1.0), else_=0.0) if name == "refusal" else cast(column, Float)
    query = select(columns.unit, func.avg(number).label("value")).where(
        _counted(experiment, version), columns.status == 200, column.is_not(None)
    )
    return query.group_by(columns.unit).subquery()


def _feedback_values(experiment: str, version: int, name: str) -> Subquery:
    """Each unit's mean of the feedback about its answers, given by response or by conversation."""
    columns = EXPOSURES.c
    known = select(columns.unit, columns.response, columns.conversation).where(_counted(experiment, version)).subquery()
    by_conversation = select(known.c.conversation, func.min(known.c.unit).label("unit")).group_by(known.c.conversation)
    conversations = by_conversation.subquery()
    responses = select(known.c.response, known.c.unit).subquery()
    given = FEEDBACK.c
    unit = func.coalesce(responses.c.unit, conversations.c.unit)
    by_id = and_(given.conversation.is_not(None), conversations.c.conversation == given.conversation)
    query = (
        select(unit.label("unit"), func.avg(given.value).label("value"))
        .select_from(FEEDBACK)
        .outerjoin(responses, and_(given.response.is_not(None), responses.c.response == given.response))
        .outerjoin(conversations, by_id)
        .where(given.experiment == experiment, given.metric == name, given.value.is_not(None),
               or_(responses.c.unit.is_not(None), conversations.c.unit.is_not(None)))
        .group_by(unit)
    )  # fmt: skip
    return query.subquery()
