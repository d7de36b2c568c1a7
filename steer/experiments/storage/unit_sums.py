"""Sums over units: the slots of time in which they are taken, what a unit gives to them, and their changes.

Sums over time are by slots, which grow with the time since the first: a day has about 400.

A unit that is taken away leaves the rounding error of the greatest value that was in the sum: of one rating of 1e15,
whose square is 1e30, one that erases the squares of all others. So units of very different size are in sums of their
own (`scale_of`), which the reader adds.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ARRAY, ColumnElement, Connection, Integer, Table, Text, and_, case, cast, func, literal, select
from sqlalchemy.dialects import postgresql, sqlite

from steer.experiments.storage.tables import SLOT_ORIGINS, UNIT_SUMS

SECONDS, HALF = 64, 32  # slots of one second; then each time twice as long, in so many slots
OCTAVES = 26  # until a century after the first
WHOLE = ""  # the metric that counts the units themselves
EPOCH = "epoch "  # with a number: the metric that counts the units of that epoch; no metric of a file has a space
STEP = 10  # powers of 2 from one scale to the next
LOWEST, HIGHEST = -3, 6
PARTS = ("mean", "mean_squared", "y", "yy", "x", "xx", "xy")

Row = Mapping[str, Any]
Sum = tuple[str, str, int]  # a row of the sums: metric, by `named`, arm, slot
Changes = dict[Sum, list[float]]  # of units, and of PARTS


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


def scale_of(y: float) -> int:
    """The scale of a unit by its sum: 0 for 0 and for sizes from 2**-10 to below 2**10, then one for each 2**10."""
    size = abs(y)
    if size >= 2.0**STEP:
        return min((math.frexp(size)[1] - 1) // STEP, HIGHEST)
    if 0 < size < 2.0**-STEP:
        return max(-(-math.frexp(size)[1] // STEP), LOWEST)
    return 0


def scale_column(y: ColumnElement[float]) -> ColumnElement[int]:
    """`scale_of` as SQL."""
    size = func.abs(y)
    great = [(size >= 2.0 ** (STEP * scale), scale) for scale in range(HIGHEST, 0, -1)]
    small = [(size < 2.0 ** (STEP * scale), scale) for scale in range(LOWEST, 0)]
    return case(*great, (size == 0, 0), *small, else_=0)


def named(metric: str, scale: int) -> str:
    """The metric of a sum over the units of one scale; no metric of a file has a space, nor is it EPOCH with a
    number."""
    return f"{scale} {metric}" if scale else metric


def names_of(metric: str) -> list[str]:
    """The metrics of the sums over the units of every scale."""
    return [named(metric, scale) for scale in range(LOWEST, HIGHEST + 1)]


def origin_of(connection: Connection, experiment: str, version: int, first: float) -> float:
    """Where the slots of a version begin, which is `first` where nothing has been added yet."""
    made = insert_into(connection.dialect.name, SLOT_ORIGINS).on_conflict_do_nothing()
    connection.execute(made, {"experiment": experiment, "version": version, "at": first})
    query = select(SLOT_ORIGINS.c.at).where(of_version(SLOT_ORIGINS, experiment, version))
    return float(connection.execute(query).scalar_one())


def of_version(table: Table, experiment: str, version: int) -> ColumnElement[bool]:
    """The rows of a version."""
    return and_(table.c.experiment == experiment, table.c.version == version)


def among(connection: Connection, column: ColumnElement[str], values: Iterable[str]) -> ColumnElement[bool]:
    """Whether a column has one of these values, which are one parameter: thousands of them take as long to prepare as
    to look up."""
    if connection.dialect.name == "postgresql":
        return column == func.any(literal(list(values), ARRAY(Text)))
    return column.in_(select(func.json_each(literal(json.dumps(list(values)))).table_valued("value").c.value))


def given(y: Any, x: Any) -> tuple[Any, ...]:
    """What a unit's sum y over x answers gives to the sums of a metric: PARTS. As numbers, or as SQL."""
    return y / x, (y / x) * (y / x), y, y * y, x, x * x, x * y


def sum_of(changes: Changes, metric: str, arm: str, slot: int) -> list[float]:
    """The change of one sum."""
    key = metric, arm, slot
    if key not in changes:
        changes[key] = [0, *(0.0 for _ in PARTS)]
    return changes[key]


def add_unit(changes: Changes, metric: str, arm: str, slot: int, y: float, x: float, sign: int) -> None:
    """Add `given` to the sum for a unit, or with `sign` -1 take it away. Written out, since it is done for every logged
    answer."""
    found = sum_of(changes, named(metric, scale_of(y)), arm, slot)
    mean, signed = y / x, sign * y
    found[0] += sign
    found[1] += sign * mean
    found[2] += sign * mean * mean
    found[3] += signed
    found[4] += signed * y
    found[5] += sign * x
    found[6] += sign * x * x
    found[7] += signed * x


def change(connection: Connection, experiment: str, version: int, changes: Mapping[Sum, Sequence[float]]) -> None:
    """Change the sums of a version."""
    rows = [
        {"experiment": experiment, "version": version, "metric": metric, "arm": arm, "slot": slot,
         "units": int(values[0]), **dict(zip(PARTS, map(float, values[1:]), strict=True))}
        for (metric, arm, slot), values in changes.items() if any(values)
    ]  # fmt: skip
    put(connection, UNIT_SUMS, rows, {name: "+" for name in ("units", *PARTS)})


def insert_into(dialect: str, table: Table) -> Any:
    """An INSERT of the database's own kind, which may handle conflicts."""
    return (postgresql if dialect == "postgresql" else sqlite).insert(table)


def put(connection: Connection, table: Table, rows: Sequence[Row], changes: Mapping[str, str | None]) -> None:
    """Insert rows; of those that are there, change columns: add (`+`), take the lesser or greater, or replace."""
    if rows:
        connection.execute(_putting(connection.dialect.name, table, tuple(changes.items())), list(rows))


@functools.cache
def _putting(dialect: str, table: Table, changes: tuple[tuple[str, str | None], ...]) -> Any:
    """The statement of `put`, which takes longer to make than to run."""
    made = insert_into(dialect, table)
    old, new = table.c, made.excluded
    what: dict[str, Any] = {}
    for name, how in changes:
        if how == "+":
            what[name] = old[name] + new[name]
            if table is UNIT_SUMS and name in PARTS:  # without units, nothing of them stays
                what[name] = case((old.units + new.units == 0, 0.0), else_=what[name])
        elif how is None:
            what[name] = new[name]
        else:
            better = new[name] < old[name] if how == "<" else new[name] > old[name]
            what[name] = case((better, new[name]), else_=old[name])
    keys = [column.name for column in table.primary_key]
    return made.on_conflict_do_update(index_elements=keys, set_=what)
