"""One server for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serve_process import KEY, Serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A running `steer serve` on a pico model, with an API key."""
    serving = Serving(tmp_path_factory.mktemp("server"), key=KEY)
    serving.wait()
    yield serving
    serving.close()
