"""Sums over the units of an experiment: what the statistics read of it, from what `sums` has added up.

Only answers that count are read (assigned, not during the ramp). Units that were seen in two arms are left out and
counted. A unit's value is the mean over its answers, or over their ratings (the newest value of feedback for each); a
metric per response is the ratio of the unit's sum to the number of its answers, or ratings.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Engine, and_, case, func, literal_column, select, true

from steer.experiments.outcomes import FIRST_ERROR
from steer.experiments.specification import Metric
from steer.experiments.statistics import moments
from steer.experiments.statistics.moments import Estimate, Sums, added
from steer.experiments.storage import ratings, sums, unit_sums
from steer.experiments.storage.database import writing
from steer.experiments.storage.tables import EXPOSURES, SLOT_ORIGINS, TALLIES, UNIT_RATINGS, UNIT_SUMS, UNITS

BUCKETS = 40  # slices of time in which sums over units are taken
CACHE = 65_536  # KiB of the log that SQLite may hold in memory for a report
EMPTY = Sums(0, 0.0, 0.0)


class Units(NamedTuple):
    """The units of each arm, and how many others were seen in two arms."""

    by_arm: dict[str, int]
    moved: int


class Tally(NamedTuple):
    """What all answers of one arm and reason add up to; `tokens` and `repetition` are over answers."""

    arm: str
    reason: str
    counted: bool
    first: float  # when the first and the last were asked for
    last: float
    answers: int
    failed: int
    gone: int  # the client went away
    refusals: int
    refused: int  # for what the client has sent
    tokens: Sums
    repetition: Sums


class Analysis(NamedTuple):
    """One version of an experiment at one moment, of which an open connection can read the sums of metrics.

    The units are divided by the time of their first answer into `BUCKETS` slices between `began` and `entered`, when
    the last of them had its first answer; `ended` is when the last answer was asked for. `earlier` is whether any unit
    had answers before it entered.
    """

    connection: Connection
    experiment: str
    version: int
    tallies: list[Tally]
    units: Units
    began: float
    ended: float
    entered: float
    earlier: bool
    origin: float  # where the slots begin in which the log has sums

    def slices(self, metric: Metric) -> dict[str, list[Sums]]:
        """For each arm the sums of a metric in each slice of time. Raises SQLAlchemyError.

        With `per: unit`, y is the unit's mean and x is 0; with `per: response`, y is the unit's sum and x its number of
        answers.
        """
        columns = UNIT_SUMS.c
        if metric.per == "response":
            values = [columns.y, columns.yy, columns.x, columns.xx, columns.xy]
        else:
            values = [columns.mean, columns.mean_squared]
        query = select(columns.arm, columns.slot, columns.units, *values).where(
            columns.experiment == self.experiment, columns.version == self.version, columns.units > 0,
            columns.metric.in_(unit_sums.names_of(metric.name)),
        )  # fmt: skip
        result = {arm: [EMPTY] * BUCKETS for arm in self.units.by_arm}
        for arm, slot, *found in self.connection.execute(query):
            number = self._slice(slot)
            result[arm][number] = added(result[arm][number], Sums(int(found[0]), *(float(each) for each in found[1:])))
        return result

    def _slice(self, slot: int) -> int:
        """The slice of time of a slot, at whose end all of its units have entered."""
        width = max((self.entered - self.began) / BUCKETS, 1e-9)
        until = (self.origin + unit_sums.slot_end(slot) - self.began) / width
        return min(max(math.ceil(until) - 1, 0), BUCKETS - 1)

    def by_epoch(self) -> dict[int, dict[str, int]]:
        """The units of each arm, by the epoch in which they got it; with adaptive weights. Raises SQLAlchemyError."""
        columns = UNIT_SUMS.c
        query = select(columns.metric, columns.arm, columns.units).where(
            columns.experiment == self.experiment, columns.version == self.version, columns.units > 0,
            columns.metric.like(f"{unit_sums.EPOCH}%"),
        )  # fmt: skip
        found: dict[int, dict[str, int]] = {}
        for metric, arm, count in self.connection.execute(query):
            found.setdefault(int(metric.removeprefix(unit_sums.EPOCH)), {})[arm] = count
        return found

    def before(self, metrics: Sequence[Metric]) -> dict[str, dict[str, Sums]]:
        """For each metric, by name, the sums over the units of each arm that had answers before they entered the
        experiment: y, and x the mean before. The metrics are of the server; the earlier answers are read once for all.
        """
        if not metrics or not self.earlier:
            return {}
        columns, units = EXPOSURES.c, UNITS.c
        values: list[Any] = []
        for number, metric in enumerate(metrics):
            total, count = func.min(units[f"y_{metric.name}"]), func.min(units[f"x_{metric.name}"])
            before = func.avg(sums.number(metric.name))
            both = and_(count > 0, before.is_not(None))  # a unit with one of them alone says nothing
            values += [case((both, total / count)).label(f"y{number}"), case((both, before)).label(f"x{number}")]
        outside = columns.reason == literal_column("'outside'")  # no parameter, so that the index of these is used
        # A conversation that began outside goes on as that, also after its unit has entered with another one.
        each = (
            select(func.min(units.arm).label("arm"), *values)
            .join(EXPOSURES, columns.unit == units.unit)
            .where(self._compared(), columns.experiment == self.experiment, outside, columns.status == 200,
                   columns.at < units.first)
            .group_by(columns.unit).subquery()
        )  # fmt: skip
        parts: list[Any] = []
        for number in range(len(metrics)):
            y, x = each.c[f"y{number}"], each.c[f"x{number}"]
            parts += [func.count(x), *(func.sum(value) for value in (y, y * y, x, x * x, x * y))]
        found: dict[str, dict[str, Sums]] = {metric.name: {} for metric in metrics}
        for arm, *row in self.connection.execute(select(each.c.arm, *parts).group_by(each.c.arm)):
            for number, metric in enumerate(metrics):
                count, *rest = row[6 * number : 6 * (number + 1)]
                if count:
                    found[metric.name][arm] = Sums(count, *(float(value) for value in rest))
        return found

    def first_values(self, metric: Metric, arm: str, most: int) -> list[float]:
        """The values of the first units of an arm, in the order of their first answers."""
        columns = UNITS.c
        source, of_unit, count = self._values(metric)
        query = (
            select(of_unit / count).select_from(source)
            .where(self._compared(), columns.arm == arm, count > 0)
            .order_by(columns.first, columns.unit).limit(most)
        )  # fmt: skip
        return [float(value) for (value,) in self.connection.execute(query)]

    def latencies(self, most: int) -> dict[str, list[float]]:
        """Seconds to the end of the latest answers that count and did not fail, by arm. They are the latest of all arms
        together, so that they are of one period: latencies change with the load."""
        columns = EXPOSURES.c
        query = (
            select(columns.arm, columns.latency)
            .where(columns.experiment == self.experiment, columns.version == self.version, columns.counted == true(),
                   columns.status < FIRST_ERROR, columns.latency.is_not(None))
            .order_by(columns.at.desc()).limit(most)
        )  # fmt: skip
        found: dict[str, list[float]] = {}
        for arm, latency in self.connection.execute(query):
            found.setdefault(arm, []).append(latency)
        return found

    def _compared(self) -> ColumnElement[bool]:
        """The units that are compared."""
        columns = UNITS.c
        return and_(columns.experiment == self.experiment, columns.version == self.version, columns.arms == 1)

    def _values(self, metric: Metric) -> tuple[Any, ColumnElement[float], ColumnElement[float]]:
        """What to read from, each unit's sum of a metric, and how many answers or pieces of feedback are in it."""
        if metric.source == "server":
            return UNITS, UNITS.c[f"y_{metric.name}"], UNITS.c[f"x_{metric.name}"]
        of, given = UNITS.c, UNIT_RATINGS.c
        same = and_(given.experiment == of.experiment, given.version == of.version, given.unit == of.unit)
        return UNITS.join(UNIT_RATINGS, and_(same, given.metric == metric.name)), given.y, given.x


@contextlib.contextmanager
def analysis(engine: Engine, experiment: str, version: int) -> Iterator[Analysis]:
    """A context with one version at one moment. Raises SQLAlchemyError.

    Answers and feedback that were not added up when they were written (by an earlier release) are added up now, which
    takes minutes for 10 million.
    """
    with engine.connect() as connection:
        complete = sums.complete(connection, experiment, version) and ratings.complete(connection, experiment)
    if not complete:
        with writing(engine) as connection:
            sums.lock(connection)
            if not sums.complete(connection, experiment, version):
                sums.rebuild(connection, experiment, version)
            if not ratings.complete(connection, experiment):
                ratings.rebuild_all(connection, experiment)
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":  # in SQLite every transaction is of one moment
            connection = connection.execution_options(isolation_level="REPEATABLE READ")
        else:
            connection.exec_driver_sql(f"PRAGMA cache_size = -{CACHE}")
        tallies, units = _tallies(connection, experiment, version), UNIT_SUMS.c
        counted = [tally for tally in tallies if tally.counted]
        began, ended = min((t.first for t in counted), default=0.0), max((t.last for t in counted), default=0.0)
        query = select(units.arm, func.sum(units.units), func.max(units.slot)).where(
            units.experiment == experiment, units.version == version, units.metric == unit_sums.WHOLE, units.units > 0
        )
        rows = connection.execute(query.group_by(units.arm)).all()
        by_arm = {arm: int(count) for arm, count, _ in rows if arm}
        moved = sum(int(count) for arm, count, _ in rows if not arm)
        query = select(SLOT_ORIGINS.c.at).where(
            SLOT_ORIGINS.c.experiment == experiment, SLOT_ORIGINS.c.version == version
        )
        origin = float(connection.execute(query).scalar() or 0.0)
        entered = max((origin + unit_sums.slot_end(slot) for arm, _, slot in rows if arm), default=began)
        outside = select(TALLIES.c.arm).where(TALLIES.c.experiment == experiment, TALLIES.c.reason == "outside")
        earlier = connection.execute(outside.limit(1)).first() is not None
        yield Analysis(connection, experiment, version, tallies, Units(by_arm, moved), began, ended,
                       min(entered, ended), earlier, origin)  # fmt: skip


def _tallies(connection: Connection, experiment: str, version: int) -> list[Tally]:
    columns = TALLIES.c
    query = select(TALLIES).where(columns.experiment == experiment, columns.version == version)
    found = []
    for row in connection.execute(query.order_by(*TALLIES.primary_key)).mappings():
        values: dict[str, Any] = {name: row[name] for name in Tally._fields[:-2]}
        for name in Tally._fields[-2:]:
            values[name] = Sums(row[f"{name}_count"], row[f"{name}_sum"], row[f"{name}_squares"])
        found.append(Tally(**values))
    return found


def total(slices: Sequence[Sums]) -> Sums:
    """The sums over all slices."""
    result = EMPTY
    for each in slices:
        result = added(result, each)
    return result


def estimate_of(metric: Metric, sums: Sums) -> Estimate:
    """The mean of a metric over the units with these sums, or the ratio where it is one per response."""
    return moments.ratio(sums) if metric.per == "response" else moments.mean(sums)
