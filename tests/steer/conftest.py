"""The command line, run inside the test's process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from steer.cli import run


@pytest.fixture
def steer(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call
