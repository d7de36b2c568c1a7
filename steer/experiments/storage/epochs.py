"""The epochs of an adaptive experiment: numbered weights, with the reason for each, that every server follows."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import NamedTuple

from sqlalchemy import Engine, func, select
from sqlalchemy.dialects import postgresql, sqlite

from steer.experiments.storage.database import writing
from steer.experiments.storage.tables import EPOCHS
from vectors.storage.files import canonical_json


class Epoch(NamedTuple):
    """An epoch: its number, the weights of the arms, why it began, the best arm where it is known, and when it began.

    Epoch 0, with the weights of the file, is not in the log: `at` is 0.
    """

    number: int
    weights: Mapping[str, float]
    reason: str = "the weights of the file"
    selected: str = ""
    at: float = 0.0


def epochs_of(engine: Engine, name: str, version: int, after: int = 0) -> list[Epoch]:
    """The epochs in the log whose number is above `after`, in order. Raises SQLAlchemyError."""
    columns = EPOCHS.c
    query = (
        select(columns.epoch, columns.weights, columns.reason, columns.selected, columns.at)
        .where(columns.experiment == name, columns.version == version, columns.epoch > after)
        .order_by(columns.epoch)
    )
    with engine.connect() as connection:
        rows = connection.execute(query).all()
    return [Epoch(number, json.loads(weights), *rest) for number, weights, *rest in rows]


def begin(engine: Engine, name: str, version: int, epoch: Epoch) -> bool:
    """Begin an epoch now, unless another server has begun it, or a later one; whether it is begun.

    Raises SQLAlchemyError.
    """
    columns = EPOCHS.c
    row = {
        "experiment": name, "version": version, "epoch": epoch.number, "weights": canonical_json(dict(epoch.weights)),
        "reason": epoch.reason, "selected": epoch.selected, "at": time.time(),
    }  # fmt: skip
    with writing(engine) as connection:
        latest = select(func.max(columns.epoch)).where(columns.experiment == name, columns.version == version)
        if (connection.execute(latest).scalar() or 0) != epoch.number - 1:
            return False
        # Two servers that both saw the epoch before: the primary key lets one of them begin the next.
        dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
        made = dialect.insert(EPOCHS).on_conflict_do_nothing().returning(columns.epoch)
        return connection.execute(made, row).first() is not None
