"""One server for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from serve_process import KEY, Serving


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Serving]]:
    """Gives the server that runs, and starts one where none does."""
    started: list[Serving] = []

    def serving() -> Serving:
        if not started or started[-1].process.poll() is not None:
            started.append(Serving(tmp_path_factory.mktemp("server"), key=KEY))
            started[-1].wait()
        return started[-1]

    yield serving
    for each in started:
        each.close()


@pytest.fixture
def server(running: Callable[[], Serving]) -> Serving:
    """A running `steer serve` on a pico model, with an API key. Those that end it stand in test_server_stops.py."""
    return running()
