"""Puts this folder on the path of the tests below it, which import `trials`; and a real PostgreSQL for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import postgres
import pytest
import trials

from steer.cli import run


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


@pytest.fixture
def ab(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> trials.Ab:
    """Runs `steer ab` in the folder of the experiment; returns status, the JSON object, and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, Any, str]:
        status = run(["ab", *words, "--json"])
        captured = capsys.readouterr()
        return status, json.loads(captured.out), captured.err

    return call


@pytest.fixture
def log(tmp_path: Path, url: str) -> trials.Log:
    """A served experiment in an empty log of each database."""
    return trials.Log(tmp_path, url)
