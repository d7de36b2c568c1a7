"""What feedback adds up to: kept beside it, as `sums` are beside the answers, in the transaction that writes either.

A response or a conversation has one rating of each metric: the newest value that was given for it. It counts for the
unit of its answers. Feedback and answers may come in any order; so `refresh` reads what the log holds of the responses
and conversations in question, and changes the ratings and all that follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Float,
    Integer,
    Select,
    Text,
    and_,
    bindparam,
    cast,
    delete,
    func,
    literal,
    select,
    true,
)

from steer.experiments.feedback import GREATEST
from steer.experiments.storage import unit_sums
from steer.experiments.storage.tables import (
    EXPOSURES,
    FEEDBACK,
    FEEDBACK_COUNTS,
    RATINGS,
    SUMMED,
    TALLIES,
    UNIT_RATINGS,
    UNIT_SUMS,
    UNITS,
)
from steer.experiments.storage.unit_sums import Changes, Row, among, of_version

# Metrics that no feedback gives.
_OF_ANSWERS = (unit_sums.WHOLE, *(name for metric in SUMMED for name in unit_sums.names_of(metric)))
Values = dict[str, tuple[float, float]]  # of a unit, by metric: the sum of its ratings, and how many there are
_INTEGERS = 2.0**50  # a thousand of them are added without rounding
_Key = tuple[str, int, str]  # of a rating: what it is about, version, metric


class _Change(NamedTuple):
    """The ratings that a unit no longer has, and those that are new."""

    gone: list[float]
    new: list[float]

    def exact(self, y: float) -> bool:
        """Whether the sum of a unit's ratings, `y` before, has no rounding error after the change: nothing is taken
        away from it, or all of its numbers are integers."""
        numbers = (y, *self.gone, *self.new)
        return not self.gone or all(each.is_integer() and abs(each) < _INTEGERS for each in numbers)


class _Kind(NamedTuple):
    """What feedback may be about: what `about` begins with, and the columns that name it."""

    prefix: str
    given: Column[Any]
    shown: Column[Any]


_KINDS = (
    _Kind("response:", FEEDBACK.c.response, EXPOSURES.c.response),
    _Kind("conversation:", FEEDBACK.c.conversation, EXPOSURES.c.conversation),
)


def abouts_of(row: Row) -> list[str]:
    """The response and the conversation that a row of feedback, or an answer, names."""
    return [kind.prefix + row[kind.given.name] for kind in _KINDS if row.get(kind.given.name) is not None]


def add(connection: Connection, rows: Sequence[Row]) -> None:
    """Add feedback, given as rows that are new in the log. Raises SQLAlchemyError."""
    count(connection, rows, 1)
    valued: dict[str, set[str]] = {}
    for row in rows:
        if row.get("value") is not None:
            valued.setdefault(row["experiment"], set()).update(abouts_of(row))
    for experiment, abouts in valued.items():
        refresh(connection, experiment, abouts)


def answered(connection: Connection, experiment: str, version: int, rows: Iterable[Row]) -> None:
    """Let feedback that came before its answers count; `rows` are new answers that count. Raises SQLAlchemyError."""
    if not _any(connection, experiment):
        return
    units: dict[str, str] = {}
    for row in rows:
        for about in abouts_of(row):
            units[about] = min(row["unit"], units.get(about, row["unit"]))
    rated: list[str] = []
    for kind, names in _by_kind(units):
        query = select(kind.given).where(_of(experiment), among(connection, kind.given, names)).distinct()
        rated += [kind.prefix + name for (name,) in connection.execute(query)]
    known = {about: rating[0] for (about, of, _), rating in _ratings(connection, experiment, rated) if of == version}
    refresh(connection, experiment, [about for about in rated if units[about] < known.get(about, "~")])


def refresh(connection: Connection, experiment: str, abouts: Iterable[str]) -> None:
    """Bring the ratings of responses and conversations up to date with the rows of the log. Raises SQLAlchemyError."""
    names = list(abouts)
    old, new = dict(_ratings(connection, experiment, names)), _wanted(connection, experiment, names)
    changes: dict[int, dict[str, dict[str, _Change]]] = {}  # by version, unit and metric
    for ratings, sign in ((old, -1), (new, 1)):
        for (about, version, metric), (unit, value) in ratings.items():
            if old.get((about, version, metric)) != new.get((about, version, metric)):
                entry = changes.setdefault(version, {}).setdefault(unit, {}).setdefault(metric, _Change([], []))
                (entry.gone if sign < 0 else entry.new).append(value)
    if not changes:
        return
    columns = ("about", "version", "metric")
    gone = [dict(zip(columns, key, strict=True)) for key in old if key not in new]
    _delete(connection, RATINGS, columns, [{"experiment": experiment, **key} for key in gone])
    changed = [
        {"experiment": experiment, **dict(zip(columns, key, strict=True)), "unit": unit, "value": value}
        for key, (unit, value) in new.items() if old.get(key) != (unit, value)
    ]  # fmt: skip
    unit_sums.put(connection, RATINGS, changed, {"unit": None, "value": None})
    for version, by_unit in changes.items():
        _change_units(connection, experiment, version, by_unit)


def of_units(connection: Connection, experiment: str, version: int, names: Iterable[str]) -> dict[str, Values]:
    """What the ratings of these units add up to. Raises SQLAlchemyError."""
    columns, found = UNIT_RATINGS.c, dict[str, Values]()
    if not _any(connection, experiment):
        return found
    query = select(columns.unit, columns.metric, columns.y, columns.x)
    query = query.where(of_version(UNIT_RATINGS, experiment, version), among(connection, columns.unit, names))
    for unit, metric, y, x in connection.execute(query):
        found.setdefault(unit, {})[metric] = y, x
    return found


def give(changes: Changes, unit: Row, slot: int, values: Values, sign: int) -> None:
    """Add what a unit, given as its row, gives to the sums by its ratings, or with `sign` -1 take it away."""
    if unit["arms"] == 1:
        for metric, (y, x) in values.items():
            if x > 0:
                unit_sums.add_unit(changes, metric, unit["arm"], slot, y, x, sign)


def count(connection: Connection, rows: Iterable[Row], sign: int) -> None:
    """Count feedback by metric and mark, or with `sign` -1 take it away. Raises SQLAlchemyError."""
    found: dict[tuple[str, str, str], int] = {}
    for row in rows:
        key = row["experiment"], row["metric"], row["mark"]
        found[key] = found.get(key, 0) + sign
    values = [
        {**dict(zip(("experiment", "metric", "mark"), key, strict=True)), "pieces": n} for key, n in found.items()
    ]
    unit_sums.put(connection, FEEDBACK_COUNTS, values, {"pieces": "+"})


def complete(connection: Connection, experiment: str) -> bool:
    """Whether the feedback about an experiment that is in the log is what was added up. Raises SQLAlchemyError."""
    there = select(func.count()).select_from(FEEDBACK).where(FEEDBACK.c.experiment == experiment).scalar_subquery()
    counted = select(func.sum(FEEDBACK_COUNTS.c.pieces)).where(FEEDBACK_COUNTS.c.experiment == experiment)
    pieces, added = connection.execute(select(there, counted.scalar_subquery())).one()
    return bool(pieces == (added or 0))


def rebuild_all(connection: Connection, experiment: str) -> None:
    """Add up all feedback about an experiment anew, by the database. Raises SQLAlchemyError."""
    given = FEEDBACK.c
    keys = (given.experiment, given.metric, given.mark)
    connection.execute(delete(FEEDBACK_COUNTS).where(FEEDBACK_COUNTS.c.experiment == experiment))
    query = select(*keys, func.count()).where(given.experiment == experiment).group_by(*keys)
    connection.execute(FEEDBACK_COUNTS.insert().from_select(FEEDBACK_COUNTS.c.keys(), query))
    versions = select(TALLIES.c.version).where(TALLIES.c.experiment == experiment).distinct()
    for version in connection.execute(versions).scalars().all():
        rebuild(connection, experiment, version)


def rebuild(connection: Connection, experiment: str, version: int) -> None:
    """Add up the feedback about the answers of a version anew, whose units are known. Raises SQLAlchemyError."""
    for table in (RATINGS, UNIT_RATINGS):
        connection.execute(delete(table).where(of_version(table, experiment, version)))
    metric = UNIT_SUMS.c.metric
    of_feedback = and_(metric.not_in(_OF_ANSWERS), metric.not_like(f"{unit_sums.EPOCH}%"))
    connection.execute(delete(UNIT_SUMS).where(of_version(UNIT_SUMS, experiment, version), of_feedback))
    name, number = cast(literal(experiment), Text), cast(literal(version), Integer)
    for kind in _KINDS:
        newest = _newest(experiment, kind, kind.given.is_not(None)).subquery()
        named = select(kind.given).where(_of(experiment), kind.given.is_not(None))
        units = _units(experiment, kind, and_(kind.shown.in_(named), EXPOSURES.c.version + 0 == version)).subquery()
        query = select(
            name,
            literal(kind.prefix, Text).concat(newest.c.name),
            number,
            newest.c.metric,
            units.c.unit,
            newest.c.value,
        ).join_from(newest, units, newest.c.name == units.c.name)
        connection.execute(RATINGS.insert().from_select(RATINGS.c.keys(), query))
    rated = RATINGS.c
    query = select(name, number, rated.unit, rated.metric, func.sum(rated.value), cast(func.count(), Float))
    query = query.where(of_version(RATINGS, experiment, version)).group_by(rated.unit, rated.metric)
    connection.execute(UNIT_RATINGS.insert().from_select(UNIT_RATINGS.c.keys(), query))
    unit_sums.change(connection, experiment, version, _added_up(connection, experiment, version))


def _added_up(connection: Connection, experiment: str, version: int) -> Changes:
    units, given = UNITS.c, UNIT_RATINGS.c
    earliest = connection.execute(select(func.min(units.first)).where(of_version(UNITS, experiment, version))).scalar()
    if earliest is None:
        return {}
    origin = unit_sums.origin_of(connection, experiment, version, float(earliest))
    slot = unit_sums.slot_column(connection, units.first - origin).label("slot")
    scale = unit_sums.scale_column(given.y).label("scale")
    query = (
        select(given.metric, scale, units.arm, slot, func.count(),
               *(func.sum(part) for part in unit_sums.given(given.y, given.x)))
        .join_from(UNIT_RATINGS, UNITS, and_(units.experiment == given.experiment, units.version == given.version,
                                             units.unit == given.unit))
        .where(of_version(UNIT_RATINGS, experiment, version), units.arms == 1)
        .group_by(given.metric, scale, units.arm, slot)
    )  # fmt: skip
    return {(unit_sums.named(metric, size), arm, number): [*found]
            for metric, size, arm, number, *found in connection.execute(query)}  # fmt: skip


def _of(experiment: str) -> ColumnElement[bool]:
    """Values about an experiment. An expression keeps SQLite from searching by it, which would read all feedback."""
    given = FEEDBACK.c
    return and_(
        given.experiment.concat("") == experiment, func.abs(given.value) < GREATEST, given.metric.not_in(_OF_ANSWERS)
    )


def _newest(experiment: str, kind: _Kind, which: ColumnElement[bool]) -> Select[Any]:
    """Each response or conversation (`name`) that is rated, with the newest value of each metric."""
    given = FEEDBACK.c
    order = func.row_number().over(partition_by=(kind.given, given.metric), order_by=(given.at.desc(), given.id.desc()))
    each = select(kind.given.label("name"), given.metric, given.value, order.label("place"))
    found = each.where(_of(experiment), which).subquery()
    return select(found.c.name, found.c.metric, found.c.value).where(found.c.place == 1)


def _units(experiment: str, kind: _Kind, which: ColumnElement[bool]) -> Select[Any]:
    """One unit for each response or conversation (`name`) and version. Clients may choose the ids of both, so several
    answers can have the same one: a rating counts once."""
    columns = EXPOSURES.c
    return (
        select(kind.shown.label("name"), columns.version, func.min(columns.unit).label("unit"))
        .where(columns.experiment.concat("") == experiment, columns.counted == true(), which)
        .group_by(kind.shown, columns.version)
    )


def _any(connection: Connection, experiment: str) -> bool:
    """Whether there is any feedback about an experiment, which most writes need not read then."""
    query = select(FEEDBACK_COUNTS.c.pieces).where(FEEDBACK_COUNTS.c.experiment == experiment).limit(1)
    return connection.execute(query).first() is not None


def _by_kind(abouts: Iterable[str]) -> Iterator[tuple[_Kind, list[str]]]:
    """The names of responses, and those of conversations."""
    names = list(abouts)
    for kind in _KINDS:
        if found := [name.removeprefix(kind.prefix) for name in names if name.startswith(kind.prefix)]:
            yield kind, found


def _wanted(connection: Connection, experiment: str, abouts: Iterable[str]) -> dict[_Key, tuple[str, float]]:
    """The ratings that the rows of the log give: unit and value."""
    wanted: dict[_Key, tuple[str, float]] = {}
    for kind, names in _by_kind(abouts):
        units: dict[str, list[tuple[int, str]]] = {}
        shown = _units(experiment, kind, among(connection, kind.shown, names))
        for name, version, unit in connection.execute(shown):
            units.setdefault(name, []).append((version, unit))
        given = _newest(experiment, kind, among(connection, kind.given, units))
        for name, metric, value in connection.execute(given):
            for version, unit in units[name]:
                wanted[kind.prefix + name, version, metric] = unit, float(value)
    return wanted


def _ratings(
    connection: Connection, experiment: str, abouts: Sequence[str]
) -> Iterator[tuple[_Key, tuple[str, float]]]:
    columns = RATINGS.c
    query = select(RATINGS).where(columns.experiment == experiment, among(connection, columns.about, abouts))
    for row in connection.execute(query).mappings() if abouts else ():
        yield (row["about"], row["version"], row["metric"]), (row["unit"], float(row["value"]))


def _change_units(
    connection: Connection, experiment: str, version: int, by_unit: dict[str, dict[str, _Change]]
) -> None:
    """Change what the ratings of units add up to, and the sums over units."""
    names = sorted(by_unit)
    old = of_units(connection, experiment, version, names)
    new: dict[str, Values] = {}
    inexact: set[str] = set()
    for unit, changed in by_unit.items():
        before = old.get(unit, {})
        for metric, each in changed.items():
            y, x = before.get(metric, (0.0, 0.0))
            if not each.exact(y):
                inexact.add(unit)
            sum_now = math.fsum((y, *each.new, *(-value for value in each.gone)))
            new.setdefault(unit, {})[metric] = sum_now, x + len(each.new) - len(each.gone)
        old[unit] = {metric: value for metric, value in before.items() if metric in changed}
    for unit, metric, y in _added_again(connection, experiment, version, inexact):
        if metric in new[unit]:
            new[unit][metric] = y, new[unit][metric][1]
    keys = [
        ({"experiment": experiment, "version": version, "unit": unit, "metric": metric}, value)
        for unit, values in new.items() for metric, value in values.items()
    ]  # fmt: skip
    unit_sums.put(connection, UNIT_RATINGS, [{**key, "y": y, "x": x} for key, (y, x) in keys if x > 0],
                  {"y": None, "x": None})  # fmt: skip
    columns = ("version", "unit", "metric")
    _delete(connection, UNIT_RATINGS, columns, [key for key, (_, x) in keys if x <= 0])
    changes: Changes = {}
    query = select(UNITS.c.unit, UNITS.c.arm, UNITS.c.arms, UNITS.c.first)
    query = query.where(of_version(UNITS, experiment, version), among(connection, UNITS.c.unit, names))
    rows = connection.execute(query).mappings().all()
    if not rows:
        return
    origin = unit_sums.origin_of(connection, experiment, version, min(row["first"] for row in rows))
    for row in rows:
        slot = unit_sums.slot_of(row["first"] - origin)
        give(changes, row, slot, old[row["unit"]], -1)
        give(changes, row, slot, new[row["unit"]], 1)
    unit_sums.change(connection, experiment, version, changes)


def _added_again(
    connection: Connection, experiment: str, version: int, units: set[str]
) -> Iterator[tuple[str, str, float]]:
    """The ratings of units added up anew: (unit, metric, sum)."""
    if not units:
        return
    shown = EXPOSURES.c  # as in `_of`, an expression, so that the index of the units is used
    query = select(shown.response, shown.conversation).where(
        shown.experiment.concat("") == experiment, shown.version + 0 == version, among(connection, shown.unit, units)
    )
    abouts = {about for row in connection.execute(query).mappings() for about in abouts_of(row)}
    values: dict[tuple[str, str], list[float]] = {}
    for (_, of, metric), (unit, value) in _ratings(connection, experiment, sorted(abouts)):
        if of == version and unit in units:
            values.setdefault((unit, metric), []).append(value)
    yield from ((unit, metric, math.fsum(each)) for (unit, metric), each in values.items())


def _delete(connection: Connection, table: Any, columns: Sequence[str], keys: Sequence[Row]) -> None:
    if keys:
        names = ("experiment", *columns)
        where = and_(*(table.c[name] == bindparam(f"of_{name}") for name in names))
        connection.execute(delete(table).where(where), [{f"of_{name}": key[name] for name in names} for key in keys])
