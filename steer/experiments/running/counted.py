"""Which answers the guardrails of a server have counted, and those in the log that they have not.

Several servers may share a log, and each judges the guardrails by the answers of all. Its own it counts as it gives
them; those of others it reads from the log.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import Engine, select

from steer.experiments.assignment import ASSIGNED
from steer.experiments.storage.tables import EXPOSURES

RESTORED = 20_000  # answers that are read at once, the latest
REMEMBERED = 200_000  # ids of answers that are known to be counted


class Counted:
    """The ids of answers that are counted. It may be used by several threads under one lock."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self.most = most
        self.ids: collections.OrderedDict[str, None] = collections.OrderedDict()

    def add(self, identity: str) -> bool:
        """Note an answer; whether it is new."""
        if identity in self.ids:
            return False
        self.ids[identity] = None
        if len(self.ids) > self.most:
            self.ids.popitem(last=False)
        return True


def in_log(
    engine: Engine, experiment: str, version: int, stage: int, since: float, but: str
) -> Iterator[Mapping[str, Any]]:
    """What guardrails read of the assigned answers of a stage that were asked for from `since` on, in order.

    Answers whose id begins with `but`, the server's own, are left out by the database: reading them takes more of a
    server's time than recording them. Raises SQLAlchemyError.
    """
    columns = EXPOSURES.c
    query = (
        select(columns.id, columns.arm, columns.status, columns.refusal, columns.response_tokens, columns.repetition,
               columns.latency, columns.at)
        .where(columns.experiment == experiment, columns.version == version, columns.at >= since,
               columns.stage == stage, columns.reason == ASSIGNED, ~columns.id.startswith(but))
        .order_by(columns.at.desc()).limit(RESTORED)
    )  # fmt: skip
    with engine.connect() as connection:
        latest = connection.execute(query).mappings().all()
    yield from reversed(latest)
