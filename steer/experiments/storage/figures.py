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
    select,
    text,
    true,
)  # fmt: skip

from steer.experiments.specification import Metric
from steer.experiments.statistics.moments import Sums, added
from steer.experiments.storage.tables import EXPOSURES, FEEDBACK

BUCKETS = 40  # slices of time in which sums over units are taken
EMPTY = Sums(0, 0.0, 0.0)


class Units(NamedTuple):
    """The units of each arm, and how many others were seen in two arms."""

    by_arm: dict[str, int]
    moved: int


class Analysis(NamedTuple):
    """The units of one version of an experiment, over which an open connection can add up metrics.

    The units are divided by the time of their first answer into `BUCKETS` slices between `began` and `entered`, when
    the last of them had its first answer; `ended` is when the last answer was asked for. `earlier` is whether any unit
    had answers before it entered.
    """

    connection: Connection
    experiment: str
    version: int
    table: Table  # a row for each unit: unit, arm, arms, first, and y and x of each metric of the server
    units: Units
    began: float
    ended: float
    entered: float
    earlier: bool

    def slices(self, metric: Metric) -> dict[str, list[Sums]]:
        """For each arm the sums of a metric in each slice of time. Raises SQLAlchemyError.

        With `per: unit`, y is the unit's mean; with `per: response`, y its sum and x its number of answers. Of a metric
        per unit x is the covariate, where the unit has one: the unit's mean before it entered the experiment.
        """
        columns = self.table.c
        source, of_unit, count = self._values(metric)
        number = (columns.first - self.began) / max((self.entered - self.began) / BUCKETS, 1e-9)
        # SQLite cuts a number off where PostgreSQL rounds it.
        whole = cast(number if self.connection.dialect.name == "sqlite" else func.floor(number), Integer)
        slices = case((whole > BUCKETS - 1, BUCKETS - 1), (whole < 0, 0), else_=whole).label("slice")
        y, x = (of_unit, count) if metric.per == "response" else (of_unit / count, cast(0.0, Float))
        query = (
            select(columns.arm, slices, func.count(), *(func.sum(each) for each in (y, y * y, x, x * x, x * y)))
            .select_from(source).where(columns.arms == 1, count > 0).group_by(columns.arm, text("slice"))
        )  # fmt: skip
        found = {arm: [EMPTY] * BUCKETS for arm in self.units.by_arm}
        for arm, number, count, *sums in self.connection.execute(query):
            found[arm][number] = Sums(count, *(float(each) for each in sums))
        return found

    def before(self, metric: Metric) -> dict[str, Sums]:
        """The sums over the units that had answers before they entered the experiment: y, and x the mean before."""
        columns = EXPOSURES.c
        value = _number(metric.name)
        # A conversation that began outside goes on as that, also after its unit has entered with another one.
        earlier = (
            select(columns.unit, func.avg(value).label("x"))
            .join(self.table, self.table.c.unit == columns.unit)
            .where(columns.experiment == self.experiment, columns.reason == "outside", columns.status == 200,
                   columns.at < self.table.c.first)
            .group_by(columns.unit).having(func.count(value) > 0).subquery()
        )  # fmt: skip
        units = self.table.c
        source, of_unit, count = self._values(metric)
        y, x = of_unit / count, earlier.c.x
        query = (
            select(units.arm, func.count(), *(func.sum(each) for each in (y, y * y, x, x * x, x * y)))
            .select_from(source).join(earlier, earlier.c.unit == units.unit)
            .where(units.arms == 1, count > 0).group_by(units.arm)
        )  # fmt: skip
        rows = self.connection.execute(query)
        return {arm: Sums(count, *(float(each) for each in sums)) for arm, count, *sums in rows}

    def first_values(self, metric: Metric, arm: str, most: int) -> list[float]:
        """The values of the first units of an arm, in the order of their first answers."""
        columns = self.table.c
        source, of_unit, count = self._values(metric)
        query = (
            select(of_unit / count).select_from(source)
            .where(columns.arm == arm, columns.arms == 1, count > 0)
            .order_by(columns.first, columns.unit).limit(most)
        )  # fmt: skip
        return [float(value) for (value,) in self.connection.execute(query)]

    def _values(self, metric: Metric) -> tuple[Any, ColumnElement[float], ColumnElement[float]]:
        """What to read from, each unit's sum of a metric, and how many answers or pieces of feedback are in it."""
        if metric.source == "server":
            return self.table, self.table.c[f"y_{metric.name}"], self.table.c[f"x_{metric.name}"]
        values = _feedback(self.experiment, self.version, metric.name).subquery()
        return self.table.join(values, values.c.unit == self.table.c.unit), values.c.y, values.c.x


@contextlib.contextmanager
def analysis(engine: Engine, experiment: str, version: int, metrics: Sequence[Metric]) -> Iterator[Analysis]:
    """A context with the units of one version and the metrics to be read of it. Raises SQLAlchemyError."""
    columns, counted = EXPOSURES.c, _counted(experiment, version)
    several = case((func.min(columns.arm) != func.max(columns.arm), 2), else_=1)
    names = [metric.name for metric in metrics if metric.source == "server"]
    with engine.connect() as connection:
        began, ended = connection.execute(select(func.min(columns.at), func.max(columns.at)).where(counted)).one()
        began, ended = float(began or 0.0), float(ended or 0.0)
        values = {"unit": columns.unit, "arm": func.min(columns.arm), "arms": several, "first": func.min(columns.at)}
        for name in names:
            value = case((columns.status == 200, _number(name)))
            values |= {f"y_{name}": func.sum(value), f"x_{name}": cast(func.count(value), Float)}
        kinds: dict[str, Any] = {"unit": Text, "arm": Text, "arms": Integer}
        table = Table("steer_units", MetaData(), *(Column(name, kinds.get(name, Double)) for name in values),
                      prefixes=["TEMPORARY"])  # fmt: skip
        connection.execute(text("DROP TABLE IF EXISTS steer_units"))
        table.create(connection)
        rows = select(*values.values()).where(counted).group_by(columns.unit)
        connection.execute(table.insert().from_select(list(values), rows))
        if any(metric.source != "server" for metric in metrics):
            connection.execute(text("CREATE UNIQUE INDEX steer_units_by_unit ON steer_units (unit)"))
        try:
            last = select(func.max(table.c.first)).where(table.c.arms == 1)
            entered = float(connection.execute(last).scalar() or began)
            units = _units(connection, table)
            outside = select(columns.id).where(columns.experiment == experiment, columns.reason == "outside").limit(1)
            earlier = connection.execute(outside).first() is not None  # once, since it may read every answer
            yield Analysis(connection, experiment, version, table, units, began, ended, entered, earlier)
        finally:
            connection.rollback()  # with the temporary table


def _units(connection: Connection, table: Table) -> Units:
    by_arm: dict[str, int] = {}
    moved = 0
    query = select(table.c.arm, table.c.arms, func.count()).group_by(table.c.arm, table.c.arms)
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


def _feedback(experiment: str, version: int, name: str) -> Select[Any]:
    """Each unit's feedback about its answers, given by response or by conversation."""
    given, columns = FEEDBACK.c, EXPOSURES.c
    # An expression keeps SQLite from searching by version, which would read all answers for each piece of feedback.
    counted = and_(
        columns.experiment.concat("") == experiment, columns.version + 0 == version, columns.counted == true()
    )
    about = and_(given.experiment == experiment, given.metric == name, given.value.is_not(None))

    def units_of(exposed: ColumnElement[str], named: ColumnElement[str]) -> Any:
        """One unit for each conversation or response that feedback names, which an index finds. Clients may choose
        the ids of both, so several answers can have the same one: feedback counts once."""
        mentioned = select(named).where(about, named.is_not(None))
        return (
            select(exposed.label("id"), func.min(columns.unit).label("unit"))
            .where(counted, exposed.in_(mentioned)).group_by(exposed).subquery()
        )  # fmt: skip

    responses = units_of(columns.response, given.response)
    conversations = units_of(columns.conversation, given.conversation)
    unit = func.coalesce(responses.c.unit, conversations.c.unit)
    return (
        select(unit.label("unit"), func.sum(given.value).label("y"), cast(func.count(), Float).label("x"))
        .select_from(FEEDBACK)
        .outerjoin(responses, responses.c.id == given.response)
        .outerjoin(conversations, conversations.c.id == given.conversation)
        .where(about, unit.is_not(None))
        .group_by(unit)
    )  # fmt: skip
