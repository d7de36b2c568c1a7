"""Sums over the units of an experiment, which the database adds up: what the statistics read of it.

Only answers that count are read (assigned, not during the ramp). Units that were seen in two arms are left out and
counted. A unit's value is the mean over its answers, or over the feedback about them; a metric per response is the
ratio of the unit's sum to the number of its answers. The answers are read once, into a temporary table of units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Double,
    Engine,
    Float,
    Integer,
    MetaData,
    Select,
    Table,
    Text,
    and_,
    case,
    cast,
    func,
    or_,
    select,
    text,
    true,
)  # fmt: skip

from steer.experiments.specification import Metric
from steer.experiments.statistics.moments import Sums, added
from steer.experiments.storage.tables import EXPOSURES, FEEDBACK

BUCKETS = 40  # slices of time in which sums over units are taken
EMPTY = Sums(0, 0.0, 0.0)

# What is left of the answers: one row for each unit. `first` is when its first answer that counts was asked for.
_UNITS = Table(
    "steer_units", MetaData(), Column("unit", Text), Column("arm", Text), Column("arms", Integer),
    Column("first", Double), Column("slice", Integer), prefixes=["TEMPORARY"],
)  # fmt: skip


class Units(NamedTuple):
    """The units of each arm, and how many others were seen in two arms."""

    by_arm: dict[str, int]
    moved: int


class Analysis(NamedTuple):
    """The units of one version of an experiment, over which an open connection can add up metrics.

    The units are divided by the time of their first answer into `BUCKETS` slices between `began` and `ended`.
    """

    connection: Connection
    experiment: str
    version: int
    units: Units
    began: float
    ended: float

    def slices(self, metric: Metric) -> dict[str, list[Sums]]:
        """For each arm the sums of a metric in each slice of time. Raises SQLAlchemyError.

        With `per: unit`, y is the unit's mean; with `per: response`, y its sum and x its number of answers. Of a metric
        per unit x is the covariate, where the unit has one: the unit's mean before it entered the experiment.
        """
        values = _values(self.experiment, self.version, metric)
        y, x = (values.c.y, values.c.x) if metric.per == "response" else (values.c.y / values.c.x, cast(0.0, Float))
        columns = _UNITS.c
        query = (
            select(columns.arm, columns.slice, func.count(), *(func.sum(each) for each in (y, y * y, x, x * x, x * y)))
            .join(values, values.c.unit == columns.unit).where(columns.arms == 1, values.c.x > 0)
            .group_by(columns.arm, columns.slice)
        )  # fmt: skip
        found = {arm: [EMPTY] * BUCKETS for arm in self.units.by_arm}
        for arm, number, count, *sums in self.connection.execute(query):
            found[arm][number] = Sums(count, *(float(each) for each in sums))
        return found

    def before(self, metric: Metric) -> dict[str, Sums]:
        """The sums over the units that had answers before they entered the experiment: y, and x the mean before."""
        columns = EXPOSURES.c
        value = _number(metric.name)
        earlier = (
            select(columns.unit, func.avg(value).label("x"))
            .where(columns.experiment == self.experiment, columns.reason == "outside", columns.status == 200)
            .group_by(columns.unit).having(func.count(value) > 0).subquery()
        )  # fmt: skip
        values = _values(self.experiment, self.version, metric)
        y, x = values.c.y / values.c.x, earlier.c.x
        query = (
            select(_UNITS.c.arm, func.count(), *(func.sum(each) for each in (y, y * y, x, x * x, x * y)))
            .join(values, values.c.unit == _UNITS.c.unit).join(earlier, earlier.c.unit == _UNITS.c.unit)
            .where(_UNITS.c.arms == 1, values.c.x > 0).group_by(_UNITS.c.arm)
        )  # fmt: skip
        rows = self.connection.execute(query)
        return {arm: Sums(count, *(float(each) for each in sums)) for arm, count, *sums in rows}

    def first_values(self, metric: Metric, arm: str, most: int) -> list[float]:
        """The values of the first units of an arm, in the order of their first answers."""
        values = _values(self.experiment, self.version, metric)
        query = (
            select(values.c.y / values.c.x)
            .join(_UNITS, values.c.unit == _UNITS.c.unit)
            .where(_UNITS.c.arm == arm, _UNITS.c.arms == 1, values.c.x > 0)
            .order_by(_UNITS.c.first, _UNITS.c.unit).limit(most)
        )  # fmt: skip
        return [float(value) for (value,) in self.connection.execute(query)]


@contextlib.contextmanager
def analysis(engine: Engine, experiment: str, version: int) -> Iterator[Analysis]:
    """A context with the units of one version. Raises SQLAlchemyError."""
    columns = EXPOSURES.c
    counted = _counted(experiment, version)
    several = case((func.min(columns.arm) != func.max(columns.arm), 2), else_=1)
    with engine.connect() as connection:
        began, ended = connection.execute(select(func.min(columns.at), func.max(columns.at)).where(counted)).one()
        began, ended = float(began or 0.0), float(ended or 0.0)
        width = max((ended - began) / BUCKETS, 1e-9)
        number = (func.min(columns.at) - began) / width
        # SQLite cuts a number off where PostgreSQL rounds it.
        whole = number if engine.dialect.name == "sqlite" else func.floor(number)
        each = (
            select(columns.unit, func.min(columns.arm).label("arm"), several.label("arms"),
                   func.min(columns.at).label("first"), cast(whole, Integer).label("slice"))
            .where(counted).group_by(columns.unit).subquery()
        )  # fmt: skip
        last = case((each.c.slice > BUCKETS - 1, BUCKETS - 1), else_=each.c.slice)
        connection.execute(text("DROP TABLE IF EXISTS steer_units"))
        _UNITS.create(connection)
        names = ["unit", "arm", "arms", "first", "slice"]
        rows = select(each.c.unit, each.c.arm, each.c.arms, each.c.first, last)
        connection.execute(_UNITS.insert().from_select(names, rows))
        connection.execute(text("CREATE UNIQUE INDEX steer_units_by_unit ON steer_units (unit)"))
        try:
            yield Analysis(connection, experiment, version, _units(connection), began, ended)
        finally:
            connection.rollback()  # with the temporary table


def _units(connection: Connection) -> Units:
    columns = _UNITS.c
    by_arm: dict[str, int] = {}
    moved = 0
    query = select(columns.arm, columns.arms, func.count()).group_by(columns.arm, columns.arms)
    for arm, arms, count in connection.execute(query):
        if arms == 1:
            by_arm[arm] = count
        else:
            moved += count
    return Units(by_arm, moved)


def total(slices: Sequence[Sums]) -> Sums:
    """The sums over all slices."""
    result = EMPTY
    for each in slices:
        result = added(result, each)
    return result


def _counted(experiment: str, version: int) -> ColumnElement[bool]:
    columns = EXPOSURES.c
    return and_(columns.experiment == experiment, columns.version == version, columns.counted == true())


def _number(name: str) -> ColumnElement[float]:
    """A metric of the server as a number."""
    column: Any = EXPOSURES.c[name]
    return case((column == true(), 1.0), (column.is_not(None), 0.0)) if name == "refusal" else cast(column, Float)


def _values(experiment: str, version: int, metric: Metric) -> Any:
    """Each unit's sum of a metric, `y`, and how many answers or pieces of feedback are in it, `x`."""
    query = _server_values(experiment, version, metric.name) if metric.source == "server" else _feedback(
        experiment, version, metric.name
    )  # fmt: skip
    return query.subquery()


def _server_values(experiment: str, version: int, name: str) -> Select[Any]:
    columns, number = EXPOSURES.c, _number(name)
    return (
        select(columns.unit, func.sum(number).label("y"), cast(func.count(number), Float).label("x"))
        .where(_counted(experiment, version), columns.status == 200).group_by(columns.unit)
    )  # fmt: skip


def _feedback(experiment: str, version: int, name: str) -> Select[Any]:
    """Each unit's feedback about its answers, given by response or by conversation."""
    given, columns = FEEDBACK.c, EXPOSURES.c
    about = and_(given.experiment == experiment, given.metric == name, given.value.is_not(None))
    # Only the conversations that feedback names, which an index finds.
    named = select(given.conversation).where(about, given.conversation.is_not(None))
    conversations = (
        select(columns.conversation, func.min(columns.unit).label("unit"))
        .where(_counted(experiment, version), columns.conversation.in_(named))
        .group_by(columns.conversation).subquery()
    )  # fmt: skip
    of_response = and_(given.response.is_not(None), columns.response == given.response, _counted(experiment, version))
    of_conversation = and_(given.conversation.is_not(None), conversations.c.conversation == given.conversation)
    unit = func.coalesce(columns.unit, conversations.c.unit)
    return (
        select(unit.label("unit"), func.sum(given.value).label("y"), cast(func.count(), Float).label("x"))
        .select_from(FEEDBACK)
        .outerjoin(EXPOSURES, of_response)
        .outerjoin(conversations, of_conversation)
        .where(about, or_(columns.unit.is_not(None), conversations.c.unit.is_not(None)))
        .group_by(unit)
    )  # fmt: skip
