"""What answers add up to: kept beside them, in the transaction that writes them, so that no report reads them all.

A new answer changes the row of its unit (`UNITS`); what the unit gave to the sums over units (`UNIT_SUMS`) is taken
away, and what it gives now is added. `ratings` does the same for feedback. Whoever writes either takes `lock` first,
before any other row.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Float, and_, case, cast, delete, func, literal_column, select, true

from steer.experiments import outcomes
from steer.experiments.storage import ratings
from steer.experiments.storage.tables import EXPOSURES, SLOT_ORIGINS, SUMMED, TALLIES, UNIT_SUMS, UNITS
from steer.experiments.storage.unit_sums import (
    EPOCH,
    PARTS,
    WHOLE,
    Changes,
    Row,
    add_unit,
    among,
    change,
    given,
    named,
    of_version,
    origin_of,
    put,
    scale_column,
    slot_column,
    slot_of,
    sum_of,
)

_LOCK = 0x73746565_7273756D  # key of the lock of PostgreSQL under which sums are changed
LARGEST = 1e300  # a metric beyond it, or none that is a number, is left out
KEYS = ("experiment", "version", "arm", "reason", "counted")
_NOTHING = {f"{kind}_{name}": 0.0 for name in SUMMED for kind in "yx"}
_PAIRS = tuple((name, f"y_{name}", f"x_{name}") for name in SUMMED)
_SQUARED = {"tokens": "response_tokens", "repetition": "repetition"}
_OF_UNIT = tuple(column.name for column in UNITS.c if not column.primary_key)
_key_of = operator.itemgetter(*KEYS)
_COUNTS = tuple(column.name for column in TALLIES.c if column.name not in (*KEYS, "first", "last"))


def lock(connection: Connection) -> None:
    """Wait until no other transaction changes sums. SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")


def number(name: str) -> ColumnElement[float]:
    """A metric of an answer as a number."""
    column: Any = EXPOSURES.c[name]
    if name == "refusal":
        return case((column == true(), 1.0), (column.is_not(None), 0.0))
    value = cast(column, Float)
    return case((func.abs(value) < literal_column(repr(LARGEST)), value))  # no parameter: SQLite sees equal terms


def add(connection: Connection, rows: Sequence[Row]) -> None:
    """Add answers, given as rows of the exposures that are new in the log. Raises SQLAlchemyError."""
    _tally(connection, rows, 1)
    counted: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["counted"]:
            counted.setdefault((row["experiment"], row["version"]), []).append(row)
    for (experiment, version), these in counted.items():
        _add_to_units(connection, experiment, version, these)
        ratings.answered(connection, experiment, version, these)


def _add_to_units(connection: Connection, experiment: str, version: int, rows: Iterable[Row]) -> None:
    by_unit: dict[str, list[Row]] = {}
    for row in rows:
        by_unit.setdefault(row["unit"], []).append(row)
    if not by_unit:
        return
    origin = origin_of(connection, experiment, version, min(row["at"] for each in by_unit.values() for row in each))
    changes: Changes = {}
    units = []
    rated = ratings.of_units(connection, experiment, version, by_unit)
    for old in _units(connection, experiment, version, by_unit):
        _give(changes, old, rated, origin, -1)
        units.append(_with(by_unit.pop(old["unit"]), old))
    units += [_with(answers, None) for answers in by_unit.values()]
    for unit in units:
        _give(changes, unit, rated, origin, 1)
    put(connection, UNITS, units, dict.fromkeys(_OF_UNIT))
    change(connection, experiment, version, changes)


def remove(connection: Connection, rows: Sequence[Row]) -> None:
    """Take answers away that are no longer in the log, given as they were. Raises SQLAlchemyError."""
    _tally(connection, rows, -1)
    gone: dict[tuple[str, int], set[str]] = {}
    for row in rows:
        if row["counted"]:
            gone.setdefault((row["experiment"], row["version"]), set()).add(row["unit"])
    shown, kept = EXPOSURES.c, UNITS.c
    for (experiment, version), units in gone.items():
        changes: Changes = {}
        rated = ratings.of_units(connection, experiment, version, units)
        for old in _units(connection, experiment, version, units):
            _give(changes, old, rated, origin_of(connection, experiment, version, old["first"]), -1)
        change(connection, experiment, version, changes)
        connection.execute(
            delete(UNITS).where(of_version(UNITS, experiment, version), among(connection, kept.unit, units))
        )
        left = select(EXPOSURES).where(
            of_version(EXPOSURES, experiment, version), among(connection, shown.unit, units), shown.counted == true()
        )
        rest = [dict(row) for row in connection.execute(left).mappings()]
        _add_to_units(connection, experiment, version, rest)
    named: dict[str, set[str]] = {}
    for row in rows:
        named.setdefault(row["experiment"], set()).update(ratings.abouts_of(row))
    for experiment, abouts in named.items():
        ratings.refresh(connection, experiment, abouts)


def complete(connection: Connection, experiment: str, version: int) -> bool:
    """Whether the answers of a version that are in the log are those that were added up. Raises SQLAlchemyError."""
    answers = select(func.count()).select_from(EXPOSURES).where(of_version(EXPOSURES, experiment, version))
    summed = select(func.sum(TALLIES.c.answers)).where(of_version(TALLIES, experiment, version))
    there, added = connection.execute(select(answers.scalar_subquery(), summed.scalar_subquery())).one()
    return bool(there == (added or 0))


def rebuild(connection: Connection, experiment: str, version: int) -> None:
    """Add up all answers of a version anew, and the feedback about them, by the database. Raises SQLAlchemyError."""
    for table in (UNITS, UNIT_SUMS, SLOT_ORIGINS, TALLIES):
        connection.execute(delete(table).where(of_version(table, experiment, version)))
    shown = EXPOSURES.c
    answers = of_version(EXPOSURES, experiment, version)
    query = select(*(shown[name] for name in KEYS), func.min(shown.at), func.max(shown.at), *_tallied())
    query = query.where(answers).group_by(*(shown[name] for name in KEYS))
    connection.execute(TALLIES.insert().from_select(TALLIES.c.keys(), query))
    several = case((func.min(shown.arm) != func.max(shown.arm), 2), else_=1)
    values: list[Any] = [shown.experiment, shown.version, shown.unit, func.min(shown.arm), several, func.min(shown.at)]
    for name in SUMMED:
        value = case((shown.status == 200, number(name)))
        values += [func.coalesce(func.sum(value), 0.0), cast(func.count(value), Float)]
    query = select(*values, func.min(shown.epoch)).where(answers, shown.counted == true())
    query = query.group_by(shown.experiment, shown.version, shown.unit)
    connection.execute(UNITS.insert().from_select(UNITS.c.keys(), query))
    _add_up_units(connection, experiment, version)
    ratings.rebuild(connection, experiment, version)


def _add_up_units(connection: Connection, experiment: str, version: int) -> None:
    kept, units = UNITS.c, of_version(UNITS, experiment, version)
    earliest = connection.execute(select(func.min(kept.first)).where(units)).scalar()
    if earliest is None:
        return
    origin = origin_of(connection, experiment, version, float(earliest))
    moved = connection.execute(select(func.count()).select_from(UNITS).where(units, kept.arms > 1)).scalar() or 0
    changes: Changes = {(WHOLE, "", 0): [moved, *(0.0 for _ in PARTS)]} if moved else {}
    slot = slot_column(connection, kept.first - origin).label("slot")
    columns: list[Any] = []
    for name in SUMMED:
        y, x = (case((kept[f"x_{name}"] > 0, kept[f"{kind}_{name}"])) for kind in "yx")
        each = given(y, x)
        columns += [func.count(x), *(func.coalesce(func.sum(value), 0.0) for value in each)]
    scales = [scale_column(kept[f"y_{name}"]).label(f"scale_{name}") for name in SUMMED]
    query = select(kept.arm, slot, func.count(), *scales, *columns).where(units, kept.arms == 1)
    width = 1 + len(PARTS)
    for arm, number, count, *found in connection.execute(query.group_by(kept.arm, slot, *scales)):
        sum_of(changes, WHOLE, arm, number)[0] += count
        for index, (name, scale) in enumerate(zip(SUMMED, found, strict=False)):
            start = len(SUMMED) + width * index
            total = sum_of(changes, named(name, scale), arm, number)
            total[:] = map(operator.add, total, found[start : start + width])
    known = and_(units, kept.arms == 1, kept.epoch.is_not(None))
    query = select(kept.epoch, kept.arm, func.count()).where(known).group_by(kept.epoch, kept.arm)
    for epoch, arm, count in connection.execute(query):
        changes[f"{EPOCH}{epoch}", arm, 0] = [count, *(0.0 for _ in PARTS)]
    change(connection, experiment, version, changes)


def _measured(row: Row, name: str) -> float | None:
    """`number` of a row."""
    value = row.get(name)
    return None if value is None or not abs(value) < LARGEST else float(value)


def _units(connection: Connection, experiment: str, version: int, names: Iterable[str]) -> list[dict[str, Any]]:
    query = select(UNITS).where(of_version(UNITS, experiment, version), among(connection, UNITS.c.unit, names))
    return [dict(row) for row in connection.execute(query).mappings()]


def _with(answers: Sequence[Row], old: Row | None) -> dict[str, Any]:
    """The row of a unit after answers of it."""
    first = answers[0]
    new: dict[str, Any] = dict(old) if old is not None else {
        "experiment": first["experiment"], "version": first["version"], "unit": first["unit"], "arm": first["arm"],
        "arms": 1, "first": first["at"], **_NOTHING, "epoch": None,
    }  # fmt: skip
    for row in answers:
        if row["arm"] != new["arm"]:
            new["arms"], new["arm"] = 2, min(new["arm"], row["arm"])
        new["first"] = min(new["first"], row["at"])
        epoch = row.get("epoch")
        if epoch is not None and (new["epoch"] is None or epoch < new["epoch"]):
            new["epoch"] = epoch
        if row["status"] != 200:
            continue
        for name, of_y, of_x in _PAIRS:
            value = _measured(row, name)
            if value is not None:
                new[of_y] += value
                new[of_x] += 1
    return new


def _give(changes: Changes, unit: Row, rated: Mapping[str, ratings.Values], origin: float, sign: int) -> None:
    """Add what a unit gives to the sums, or with `sign` -1 take it away."""
    if unit["arms"] > 1:
        sum_of(changes, WHOLE, "", 0)[0] += sign
        return
    arm, slot = unit["arm"], slot_of(unit["first"] - origin)
    if unit["epoch"] is not None:
        sum_of(changes, f"{EPOCH}{unit['epoch']}", arm, 0)[0] += sign
    sum_of(changes, WHOLE, arm, slot)[0] += sign
    for name, of_y, of_x in _PAIRS:
        if unit[of_x] > 0:
            add_unit(changes, name, arm, slot, unit[of_y], unit[of_x], sign)
    ratings.give(changes, unit, slot, rated.get(unit["unit"], {}), sign)


def _tally(connection: Connection, rows: Sequence[Row], sign: int) -> None:
    """Add answers to the tallies, or with `sign` -1 take them away."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key, at, status = _key_of(row), row["at"], row["status"]
        if key not in found:
            found[key] = {"first": at, "last": at, **dict.fromkeys(_COUNTS, 0)}
        entry = found[key]
        entry["first"], entry["last"] = min(entry["first"], at), max(entry["last"], at)
        entry["answers"] += sign
        if status >= outcomes.FIRST_ERROR:
            entry["failed" if outcomes.failed(status) else "refused" if outcomes.refused(status) else "gone"] += sign
            continue
        entry["refusals"] += sign * bool(row.get("refusal"))
        for name, column in _SQUARED.items():
            measured = _measured(row, column)
            if measured is not None:
                entry[f"{name}_count"] += sign
                entry[f"{name}_sum"] += sign * measured
                entry[f"{name}_squares"] += sign * measured**2
    values = [{**dict(zip(KEYS, key, strict=True)), **entry} for key, entry in found.items()]
    how: dict[str, str | None] = {name: "+" for name in _COUNTS}
    put(connection, TALLIES, values, how | {"first": "<", "last": ">"} if sign > 0 else how)
    if sign < 0:
        for value in values:
            _renew_times(connection, value)


def _renew_times(connection: Connection, removed: Row) -> None:
    """Find the first and the last time of a tally again, where one of them was that of a removed answer."""
    tally = and_(*(TALLIES.c[name] == removed[name] for name in KEYS))
    first, last, answers = connection.execute(
        select(TALLIES.c.first, TALLIES.c.last, TALLIES.c.answers).where(tally)
    ).one()
    if answers <= 0:
        connection.execute(delete(TALLIES).where(tally))
    elif removed["first"] <= first or removed["last"] >= last:
        query = select(func.min(EXPOSURES.c.at), func.max(EXPOSURES.c.at))
        at = connection.execute(query.where(*(EXPOSURES.c[name] == removed[name] for name in KEYS))).one()
        connection.execute(TALLIES.update().where(tally), {"first": at[0], "last": at[1]})


def _tallied() -> list[ColumnElement[Any]]:
    """What `_tally` adds, as SQL."""
    shown = EXPOSURES.c
    served = shown.status < outcomes.FIRST_ERROR

    def count(condition: ColumnElement[bool]) -> ColumnElement[int]:
        return func.count(case((condition, 1)))

    columns: list[ColumnElement[Any]] = [
        func.count(), count(shown.status >= outcomes.FAILED), count(shown.status == outcomes.GONE),
        count(and_(served, shown.refusal == true())),
    ]  # fmt: skip
    for name in _SQUARED.values():
        value = case((served, number(name)))
        sums = (func.coalesce(func.sum(each), 0.0) for each in (value, value * value))
        columns += [func.count(value), *sums]
    refused = and_(~served, shown.status < outcomes.FAILED, shown.status != outcomes.GONE)
    return [*columns, count(refused)]
