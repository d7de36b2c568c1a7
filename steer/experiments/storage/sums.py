"""What answers add up to: kept beside them, in the transaction that writes them, so that no report reads them all.

A new answer changes the row of its unit (`UNITS`); what the unit gave to the sums over units (`UNIT_SUMS`) is taken
away, and what it gives now is added. Sums over time are by slots, which grow with the time since the first: a day has
about 400. Whoever writes takes `lock` first, before any other row.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Float, Integer, Table, and_, case, cast, delete, func, select, true
from sqlalchemy.dialects import postgresql, sqlite

from steer.experiments import outcomes
from steer.experiments.storage.tables import EXPOSURES, SLOT_ORIGINS, SUMMED, TALLIES, UNIT_SUMS, UNITS

_LOCK = 0x73746565_7273756D  # key of the lock of PostgreSQL under which sums are changed
SECONDS, HALF = 64, 32  # slots of one second; then each time twice as long, in so many slots
OCTAVES = 26  # until a century after the first
LARGEST = 1e300  # a metric beyond it, or none that is a number, is left out
CHUNK = 500  # units of one statement
WHOLE, KEYS = "", ("experiment", "version", "arm", "reason", "counted")
PARTS = ("mean", "mean_squared", "y", "yy", "x", "xx", "xy")
_NOTHING = {f"{kind}_{name}": 0.0 for name in SUMMED for kind in "yx"}
_SQUARED = {"tokens": "response_tokens", "repetition": "repetition"}
_OF_UNIT = tuple(column.name for column in UNITS.c if not column.primary_key)
_key_of = operator.itemgetter(*KEYS)
_PAIRS = tuple((name, f"y_{name}", f"x_{name}") for name in SUMMED)
_COUNTS = tuple(column.name for column in TALLIES.c if column.name not in (*KEYS, "first", "last"))

Row = Mapping[str, Any]
Sum = tuple[str, str, int]  # a row of the sums: metric, arm, slot


def lock(connection: Connection) -> None:
    """Wait until no other transaction changes sums. SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")


def slot_of(elapsed: float) -> int:
    """The slot of a time in seconds since the first slot began."""
    if elapsed < SECONDS:
        return max(int(elapsed), 0)
    octave = min(math.frexp(elapsed / SECONDS)[1] - 1, OCTAVES - 1)
    within = int((elapsed - SECONDS * 2**octave) / 2 ** (octave + 1))
    return SECONDS + HALF * octave + min(within, HALF - 1)


def slot_end(slot: int) -> float:
    """When a slot ends, in seconds since the first slot began."""
    if slot < SECONDS:
        return slot + 1.0
    octave, within = divmod(slot - SECONDS, HALF)
    return SECONDS * 2.0**octave + (within + 1) * 2.0 ** (octave + 1)


def slot_column(connection: Connection, elapsed: ColumnElement[float]) -> ColumnElement[int]:
    """`slot_of` as SQL."""

    def whole(value: ColumnElement[float]) -> ColumnElement[int]:
        # SQLite cuts a number off where PostgreSQL rounds it.
        return cast(value if connection.dialect.name == "sqlite" else func.floor(value), Integer)

    starts = [(octave, SECONDS * 2.0**octave) for octave in range(OCTAVES)]
    return case(
        (elapsed < 0, 0), (elapsed < SECONDS, whole(elapsed)),
        *((elapsed < 2 * start, SECONDS + HALF * k + whole((elapsed - start) / 2.0 ** (k + 1))) for k, start in starts),
        else_=SECONDS + HALF * OCTAVES - 1,
    )  # fmt: skip


def number(name: str) -> ColumnElement[float]:
    """A metric of an answer as a number."""
    column: Any = EXPOSURES.c[name]
    if name == "refusal":
        return case((column == true(), 1.0), (column.is_not(None), 0.0))
    value = cast(column, Float)
    return case((func.abs(value) < LARGEST, value))


def add(connection: Connection, rows: Sequence[Row]) -> None:
    """Add answers, given as rows of the exposures that are new in the log. Raises SQLAlchemyError."""
    _tally(connection, rows, 1)
    _add_to_units(connection, [row for row in rows if row["counted"]])


def _add_to_units(connection: Connection, rows: Iterable[Row]) -> None:
    by_version: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in rows:
        by_version.setdefault((row["experiment"], row["version"]), {}).setdefault(row["unit"], []).append(row)
    for (experiment, version), by_unit in by_version.items():
        origin = _origin(connection, experiment, version, min(row["at"] for each in by_unit.values() for row in each))
        changes: dict[Sum, list[float]] = {}
        units = []
        for old in _units(connection, experiment, version, list(by_unit)):
            _give(changes, old, origin, -1)
            units.append(_with(by_unit.pop(old["unit"]), old))
        units += [_with(answers, None) for answers in by_unit.values()]
        for unit in units:
            _give(changes, unit, origin, 1)
        _put(connection, UNITS, units, dict.fromkeys(_OF_UNIT))
        _change(connection, experiment, version, changes)


def remove(connection: Connection, rows: Sequence[Row]) -> None:
    """Take answers away that are no longer in the log, given as they were. Raises SQLAlchemyError."""
    _tally(connection, rows, -1)
    gone: dict[tuple[str, int], set[str]] = {}
    for row in rows:
        if row["counted"]:
            gone.setdefault((row["experiment"], row["version"]), set()).add(row["unit"])
    shown, kept = EXPOSURES.c, UNITS.c
    for (experiment, version), units in gone.items():
        changes: dict[Sum, list[float]] = {}
        for old in _units(connection, experiment, version, sorted(units)):
            _give(changes, old, _origin(connection, experiment, version, old["first"]), -1)
        _change(connection, experiment, version, changes)
        for these in _chunks(sorted(units)):
            connection.execute(delete(UNITS).where(_of(UNITS, experiment, version), kept.unit.in_(these)))
            left = select(EXPOSURES).where(
                _of(EXPOSURES, experiment, version), shown.unit.in_(these), shown.counted == true()
            )
            _add_to_units(connection, [dict(row) for row in connection.execute(left).mappings()])


def complete(connection: Connection, experiment: str, version: int) -> bool:
    """Whether the answers of a version that are in the log are those that were added up. Raises SQLAlchemyError."""
    answers = select(func.count()).select_from(EXPOSURES).where(_of(EXPOSURES, experiment, version)).scalar_subquery()
    summed = select(func.sum(TALLIES.c.answers)).where(_of(TALLIES, experiment, version)).scalar_subquery()
    there, added = connection.execute(select(answers, summed)).one()
    return bool(there == (added or 0))


def rebuild(connection: Connection, experiment: str, version: int) -> None:
    """Add up all answers of a version anew, by the database. Raises SQLAlchemyError."""
    for table in (UNITS, UNIT_SUMS, SLOT_ORIGINS, TALLIES):
        connection.execute(delete(table).where(_of(table, experiment, version)))
    shown = EXPOSURES.c
    answers = _of(EXPOSURES, experiment, version)
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


def _add_up_units(connection: Connection, experiment: str, version: int) -> None:
    kept, units = UNITS.c, _of(UNITS, experiment, version)
    earliest = connection.execute(select(func.min(kept.first)).where(units)).scalar()
    if earliest is None:
        return
    origin = _origin(connection, experiment, version, float(earliest))
    moved = connection.execute(select(func.count()).select_from(UNITS).where(units, kept.arms > 1)).scalar() or 0
    changes: dict[Sum, list[float]] = {(WHOLE, "", 0): [moved, *(0.0 for _ in PARTS)]} if moved else {}
    slot = slot_column(connection, kept.first - origin).label("slot")
    columns: list[Any] = []
    for name in SUMMED:
        y, x = (case((kept[f"x_{name}"] > 0, kept[f"{kind}_{name}"])) for kind in "yx")
        each = (y / x, (y / x) * (y / x), y, y * y, x, x * x, x * y)
        columns += [func.count(x), *(func.coalesce(func.sum(value), 0.0) for value in each)]
    query = select(kept.arm, slot, func.count(), *columns).where(units, kept.arms == 1).group_by(kept.arm, slot)
    width = 1 + len(PARTS)
    for arm, number, count, *found in connection.execute(query):
        changes[WHOLE, arm, number] = [count, *(0.0 for _ in PARTS)]
        for index, name in enumerate(SUMMED):
            changes[name, arm, number] = [*found[width * index : width * (index + 1)]]
    _change(connection, experiment, version, changes)


def _of(table: Table, experiment: str, version: int) -> ColumnElement[bool]:
    return and_(table.c.experiment == experiment, table.c.version == version)


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    return (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))


def _measured(row: Row, name: str) -> float | None:
    """`number` of a row."""
    value = row.get(name)
    return None if value is None or not abs(value) < LARGEST else float(value)


def _origin(connection: Connection, experiment: str, version: int, first: float) -> float:
    """Where the slots of a version begin, which is `first` where nothing has been added yet."""
    made = _insert(connection.dialect.name, SLOT_ORIGINS).on_conflict_do_nothing()
    connection.execute(made, {"experiment": experiment, "version": version, "at": first})
    query = select(SLOT_ORIGINS.c.at).where(_of(SLOT_ORIGINS, experiment, version))
    return float(connection.execute(query).scalar_one())


def _units(connection: Connection, experiment: str, version: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for these in _chunks(names):
        query = select(UNITS).where(_of(UNITS, experiment, version), UNITS.c.unit.in_(these))
        yield from map(dict, connection.execute(query).mappings().all())


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


def _give(changes: dict[Sum, list[float]], unit: Row, origin: float, sign: int) -> None:
    """Add what a unit gives to the sums, or with `sign` -1 take it away."""

    def sum_of(metric: str, arm: str, slot: int) -> list[float]:
        key = metric, arm, slot
        if key not in changes:
            changes[key] = [0, *(0.0 for _ in PARTS)]
        return changes[key]

    if unit["arms"] > 1:
        sum_of(WHOLE, "", 0)[0] += sign
        return
    arm, slot = unit["arm"], slot_of(unit["first"] - origin)
    sum_of(WHOLE, arm, slot)[0] += sign
    for name, of_y, of_x in _PAIRS:
        y, x = unit[of_y], unit[of_x]
        if x > 0:  # written out, since it is done for every answer that is logged
            found, mean, signed = sum_of(name, arm, slot), y / x, sign * y
            found[0] += sign
            found[1] += sign * mean
            found[2] += sign * mean * mean
            found[3] += signed
            found[4] += signed * y
            found[5] += sign * x
            found[6] += sign * x * x
            found[7] += signed * x


def _change(connection: Connection, experiment: str, version: int, changes: Mapping[Sum, Sequence[float]]) -> None:
    rows = [
        {"experiment": experiment, "version": version, "metric": metric, "arm": arm, "slot": slot,
         "units": int(values[0]), **dict(zip(PARTS, map(float, values[1:]), strict=True))}
        for (metric, arm, slot), values in changes.items() if any(values)
    ]  # fmt: skip
    _put(connection, UNIT_SUMS, rows, {name: "+" for name in ("units", *PARTS)})


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
    _put(connection, TALLIES, values, how | {"first": "<", "last": ">"} if sign > 0 else how)
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


def _insert(dialect: str, table: Table) -> Any:
    return (postgresql if dialect == "postgresql" else sqlite).insert(table)


def _put(connection: Connection, table: Table, rows: Sequence[Row], changes: Mapping[str, str | None]) -> None:
    """Insert rows; of those that are there, change columns: add (`+`), take the lesser or greater, or replace."""
    if rows:
        connection.execute(_putting(connection.dialect.name, table, tuple(changes.items())), list(rows))


@functools.cache
def _putting(dialect: str, table: Table, changes: tuple[tuple[str, str | None], ...]) -> Any:
    """The statement of `_put`, which takes longer to make than to run."""
    made = _insert(dialect, table)
    old, new = table.c, made.excluded
    what: dict[str, Any] = {}
    for name, how in changes:
        if how == "+":
            what[name] = old[name] + new[name]
        elif how is None:
            what[name] = new[name]
        else:
            better = new[name] < old[name] if how == "<" else new[name] > old[name]
            what[name] = case((better, new[name]), else_=old[name])
    keys = [column.name for column in table.primary_key]
    return made.on_conflict_do_update(index_elements=keys, set_=what)
