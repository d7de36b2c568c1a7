"""Puts this folder on the path of the tests below it, which import `trials`; and a real PostgreSQL for them."""

from __future__ import annotations

from collections.abc import Iterator

import postgres
import pytest


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[postgres.Server]:
    """A PostgreSQL of this session, on loopback."""
    with postgres.running() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of an empty log, in each of the two databases."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('log')}/log.db"
    server: postgres.Server = request.getfixturevalue("postgresql")
    return server.new_log()
