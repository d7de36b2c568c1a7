"""What must stay forgotten: rows of a unit that were on their way to the log while its rows were removed.

Rows wait in the journals and the memory of servers, on any machine. So a removal leaves a mark in the log, in the same
transaction, and whoever writes rows leaves out those that a mark is about. A mark is a hash of a salted hash, which no
row holds any more: it says of nobody that they were there.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, select

from steer.experiments.storage.tables import EVENTS
from vectors.storage.files import canonical_json, digest_bytes

Row = tuple[str, Mapping[str, Any]]  # the name of a table, and a row of it

FORGOTTEN = "forgotten"  # kind of the event
_VERSION = 0  # which no experiment has: marks are about all versions
_LOCKS = {"writing": "ROW EXCLUSIVE", "removing": "SHARE ROW EXCLUSIVE"}


def lock(connection: Connection, doing: str) -> None:
    """Let `removing` wait until all `writing` has ended, and the other way round, up to the end of the transaction.

    In SQLite one transaction writes at a time.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"LOCK TABLE exposures, feedback IN {_LOCKS[doing]} MODE")


def mark(connection: Connection, experiment: str, hashes: Iterable[str], responses: Iterable[str]) -> None:
    """Note that these salted hashes of units and conversations, up to now, and these responses are forgotten."""
    reason = {"hashes": sorted(map(_marked, hashes)), "responses": sorted(map(_marked, responses))}
    values = {
        "id": uuid.uuid4().hex, "experiment": experiment, "version": _VERSION, "kind": FORGOTTEN,
        "reason": canonical_json(reason), "at": time.time(),
    }  # fmt: skip
    connection.execute(EVENTS.insert(), values)


def remembered(connection: Connection, rows: Sequence[Row]) -> list[Row]:
    """The rows that no mark is about. The responses of answers that are left out are marked in turn."""
    names = {str(row.get("experiment")) for _, row in rows}
    columns = EVENTS.c
    query = select(columns.experiment, columns.reason, columns.at).where(
        columns.experiment.in_(names), columns.version == _VERSION, columns.kind == FORGOTTEN
    )
    hashes: dict[tuple[str, str], float] = {}
    responses: set[tuple[str, str]] = set()
    for experiment, reason, at in connection.execute(query):
        marks = json.loads(reason)
        responses |= {(experiment, each) for each in marks["responses"]}
        for each in marks["hashes"]:
            hashes[experiment, each] = max(at, hashes.get((experiment, each), at))
    if not hashes and not responses:
        return list(rows)
    dropped: dict[str, set[str]] = {}
    for _, row in rows:
        named = [row[key] for key in ("unit", "conversation") if row.get(key)]
        ends = [hashes.get((row["experiment"], _marked(each))) for each in named]
        if any(end is not None and row["at"] <= end for end in ends) and row.get("response"):
            dropped.setdefault(row["experiment"], set()).add(row["response"])
    for experiment, found in dropped.items():
        mark(connection, experiment, (), found)
        responses |= {(experiment, _marked(each)) for each in found}
    return [(table, row) for table, row in rows if not _is_about(row, hashes, responses)]


def _is_about(row: Mapping[str, Any], hashes: Mapping[tuple[str, str], float], responses: set[tuple[str, str]]) -> bool:
    experiment = str(row.get("experiment"))
    if row.get("response") and (experiment, _marked(row["response"])) in responses:
        return True
    named = (hashes.get((experiment, _marked(row[key]))) for key in ("unit", "conversation") if row.get(key))
    return any(end is not None and row["at"] <= end for end in named)


def _marked(text: str) -> str:
    return digest_bytes(text.encode("utf-8", "surrogatepass")).removeprefix("sha256:")[:32]
