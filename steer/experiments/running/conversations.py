"""The arms of conversations that have begun: a conversation keeps its arm, whatever happens to the experiment.

A stop sends new conversations to the control, and a step of the ramp brings new ones in; those that had begun go on as
they began. The memory is bounded; it is filled from the log when a server starts, and with what other servers have
begun since whenever the state changes, so that several servers agree.
"""

from __future__ import annotations

import collections
import threading
import time
from typing import NamedTuple

from sqlalchemy import Engine, select

from steer.experiments.storage.tables import EXPERIMENTS, EXPOSURES

MOST = 100_000
DAY = 86_400.0  # seconds after which a conversation may begin again


class Begun(NamedTuple):
    """How a conversation began: its arm, what the arm did (`Arm.digest`), why, in which version and stage, when it was
    seen last, the salted hash of its unit, and the epoch in which the unit got its arm."""

    arm: str
    digest: str
    reason: str
    version: int
    stage: int
    at: float
    unit: str
    epoch: int | None = None


class Answered(NamedTuple):
    """What a response belongs to: the salted hashes of its conversation and unit, and the version."""

    conversation: str
    unit: str
    version: int


class Conversations:
    """The conversations of one experiment, by their salted hashes; and the conversation of each response, by its id.

    Clients choose the ids of conversations, and two users may choose the same one: each has a conversation of its own.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.lock = threading.Lock()
        self.begun: collections.OrderedDict[tuple[str, str], Begun] = collections.OrderedDict()  # with their units
        self.units: collections.OrderedDict[str, str] = collections.OrderedDict()  # the latest of each conversation
        self.responses: collections.OrderedDict[str, Answered] = collections.OrderedDict()

    def find(self, conversation: str, unit: str | None = None) -> Begun | None:
        """How a conversation began, of this unit or of the latest one; None for a new one."""
        with self.lock:
            begun = self.begun.get((conversation, unit or self.units.get(conversation, "")))
            return begun if begun is not None and begun.at > time.time() - DAY else None

    def put(self, conversation: str, begun: Begun) -> None:
        """Remember a conversation."""
        key = conversation, begun.unit
        with self.lock:
            self.begun[key], self.units[conversation] = begun, begun.unit
            self.begun.move_to_end(key)
            self.units.move_to_end(conversation)
            for remembered in (self.begun, self.units):
                while len(remembered) > self.most:
                    remembered.popitem(last=False)

    def answered(self, response: str, answered: Answered) -> None:
        """Remember what a response belongs to."""
        with self.lock:
            self.responses[response] = answered
            self.responses.move_to_end(response)
            while len(self.responses) > self.most:
                self.responses.popitem(last=False)

    def of_response(self, response: str) -> Answered | None:
        """What a response belongs to; None for one that is not remembered."""
        with self.lock:
            return self.responses.get(response)

    def forget(self) -> None:
        """Forget everything."""
        with self.lock:
            self.begun.clear()
            self.units.clear()
            self.responses.clear()

    def restore(self, engine: Engine, experiment: str, but: str, seconds: float = DAY) -> None:
        """Add the conversations of the last seconds in the log, as they began. Raises SQLAlchemyError.

        Answers whose id begins with `but` are left out: they are the server's own, which it remembers. Of a
        conversation that is known, only when it was seen last is news: later answers of it say `continued`.
        """
        columns, versions = EXPOSURES.c, EXPERIMENTS.c
        query = (
            select(columns.conversation, columns.response, columns.arm, columns.digest, columns.reason,
                   columns.version, columns.stage, columns.at, columns.unit, columns.epoch)
            .where(columns.experiment == experiment, columns.at > time.time() - seconds, columns.reason != "forced",
                   # The versions by name, so that the index leads to the latest answers.
                   columns.version.in_(select(versions.version).where(versions.experiment == experiment)),
                   ~columns.id.startswith(but))
            .order_by(columns.at.desc()).limit(self.most)
        )  # fmt: skip
        with engine.connect() as connection:
            rows = connection.execute(query).all()
        with self.lock:
            for conversation, response, *values in reversed(rows):
                began = Begun(*values)
                if response is not None:
                    self.responses.setdefault(response, Answered(conversation, began.unit, began.version))
                key = conversation, began.unit
                known = self.begun.setdefault(key, began)
                self.begun[key] = known._replace(at=max(known.at, began.at))
                self.units.setdefault(conversation, began.unit)
