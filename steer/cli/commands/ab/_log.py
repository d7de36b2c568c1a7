"""What the subcommands share that read a log: the argument, and the log with what killed servers have left for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from steer.cli.output import out
from vectors.errors import UsageError
from vectors.registry.options import option

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from steer.experiments.document import Address


@dataclass(frozen=True, kw_only=True)
class Named:
    """The experiment, by its file or its name."""

    experiment: str = option(help="The experiment: its file, or NAME for NAME.yaml here.", argument=True)


@dataclass(frozen=True, kw_only=True)
class Version:
    """The version of the experiment."""

    version: int | None = option(
        None, help="The version of the experiment.", low=1, default_text="the one that was started last"
    )


class OpenLog(NamedTuple):
    """An open log, and the experiment in it."""

    engine: Engine
    address: Address


class NotServed(UsageError):
    """An experiment whose log no server has begun, or whose SQLite file has been moved away."""


@contextlib.contextmanager
def opened(reference: str) -> Iterator[OpenLog]:
    """A context with the log of an experiment, which is never begun here: only a server does. Raises UsageError,
    NotServed, LogError."""
    from sqlalchemy.exc import SQLAlchemyError

    from steer.experiments import document
    from steer.experiments.storage.database import (
        LogError,
        NoLogFile,
        interrupted,
        open_log,
        reason_of,
        shown,
    )
    from steer.experiments.storage.journal import journal_of
    from steer.experiments.storage.writer import recover

    address = document.address(reference)
    try:
        engine = open_log(address.log, create=False)
    except NoLogFile as error:
        raise NotServed(
            f"the experiment {address.name} has not been served yet: there is no file {error.file}",
            "steer serve MODEL --experiment FILE begins it; one that was moved away can be put back",
        ) from error
    try:
        damaged: list[int] = []
        count = recover(engine, journal_of(address.file, address.name), damaged.append)
        if count:
            out.say(f"{count} rows that a killed server had left were taken into the log")
        if damaged:
            out.warn(f"{sum(damaged)} rows of a killed server could not be read")
        yield OpenLog(engine, address)
    except SQLAlchemyError as error:
        if interrupted(error):
            raise KeyboardInterrupt from error
        raise LogError(f"the log {shown(address.log)} can't be read: {reason_of(error)}", "check it") from error
    finally:
        engine.dispose()
