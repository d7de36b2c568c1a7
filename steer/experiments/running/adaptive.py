"""Adaptive weights in a server: the epoch that it follows, and the arms of units, which keep what they got.

The weights change, so an arm does not follow from the unit alone: it is that of the epoch in which the unit was first
seen. It is remembered, and where the memory (bounded, and empty after a start) does not have it, the log may.
"""

from __future__ import annotations

import collections
import threading
import time
from typing import NamedTuple

from sqlalchemy import Engine, select

from steer.experiments.assignment import ASSIGNED, Assignment, assign, hashed
from steer.experiments.running import allocating
from steer.experiments.specification import Experiment
from steer.experiments.storage import epochs
from steer.experiments.storage.tables import EXPOSURES

MOST = 200_000  # units that are remembered


class Known(NamedTuple):
    """The arm of a unit, and the epoch in which it got it."""

    arm: str
    epoch: int


class Adaptive:
    """The weights and the units of one version of an adaptive experiment. Several threads may use it."""

    def __init__(self, engine: Engine, experiment: Experiment, version: int, most: int = MOST) -> None:
        assert experiment.allocation is not None
        self.engine, self.experiment, self.version = engine, experiment, version
        self.every, self.most = experiment.allocation.every, most
        self.lock = threading.Lock()
        self.known: collections.OrderedDict[str, Known] = collections.OrderedDict()  # by the units' hashes
        self.epoch = allocating.file_weights(experiment)
        self.adapted = 0.0  # when the sums were last read
        self.follow()

    def assign(self, text: str, unit: str, coverage: float) -> tuple[Assignment, int | None]:
        """The arm of a unit, and the epoch in which it got it, where it takes part; `unit` is its hash."""
        with self.lock:
            assigned = assign(self.experiment, text, coverage, self.epoch.weights)
            if assigned.reason != ASSIGNED:
                return assigned, None
            known = self._remember(unit, Known(assigned.arm, self.epoch.number))
        return Assignment(known.arm, ASSIGNED), known.epoch

    def unknown(self, text: str, coverage: float) -> str | None:
        """The hash of a unit whose arm only the log may know (`look_up`); None for one that is remembered, or takes no
        part."""
        unit = hashed(self.experiment.salt, text)
        with self.lock:
            if unit in self.known:
                return None
        return unit if assign(self.experiment, text, coverage).reason == ASSIGNED else None

    def look_up(self, unit: str) -> None:
        """Remember what the log knows of a unit: its first answer that was assigned. Raises SQLAlchemyError."""
        columns = EXPOSURES.c
        # Expressions keep the database from searching by version and time, which would read all answers of others.
        version = columns.experiment.concat("") == self.experiment.name, columns.version + 0 == self.version
        query = (
            select(columns.arm, columns.epoch)
            .where(columns.unit == unit, *version, columns.reason == ASSIGNED, columns.epoch.is_not(None))
            .order_by(columns.at + 0.0).limit(1)
        )  # fmt: skip
        with self.engine.connect() as connection:
            row = connection.execute(query).first()
        if row is not None:
            with self.lock:
                self._remember(unit, Known(*row))

    def follow(self) -> None:
        """Follow the latest epoch in the log. Raises SQLAlchemyError."""
        newer = epochs.epochs_of(self.engine, self.experiment.name, self.version, self.epoch.number)
        with self.lock:
            if newer and newer[-1].number > self.epoch.number:
                self.epoch = newer[-1]

    def adapt(self) -> None:
        """Begin the next epoch where it is time for it and the sums in the log say so. Raises SQLAlchemyError."""
        if self.epoch.selected or time.time() - max(self.epoch.at, self.adapted) < self.every:
            return
        self.adapted = time.time()
        begun = allocating.following(self.engine, self.experiment, self.version)
        if begun is not None:
            epochs.begin(self.engine, self.experiment.name, self.version, begun)
            self.follow()

    def _remember(self, unit: str, known: Known) -> Known:
        """Remember a unit, unless it is remembered already; return what is remembered."""
        known = self.known.setdefault(unit, known)
        self.known.move_to_end(unit)
        while len(self.known) > self.most:
            self.known.popitem(last=False)
        return known
