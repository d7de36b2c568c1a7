"""The command line, run inside the test's process, and processes with vLLM engines."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_process import Engines

from steer.cli import run

NEED_VLLM = {"engines", "stock", "server"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything that starts an engine is slow, and needs vLLM."""
    there = importlib.util.find_spec("vllm") is not None
    for item in items:
        if Path(__file__).parent in item.path.parents and NEED_VLLM & set(item.fixturenames):  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.slow)
            if not there:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make setup, on Linux"))


@pytest.fixture
def steer(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's cache of compiled graphs, which the engines with and without the plugin share."""
    return tmp_path_factory.mktemp("engines") / "cache"


@pytest.fixture(scope="session")
def engines(compile_cache: Path) -> Iterator[Engines]:
    """Engines with the plugin."""
    process = Engines(True, compile_cache.with_name("log.txt"), VLLM_CACHE_ROOT=str(compile_cache))
    yield process
    process.close()


@pytest.fixture(scope="session")
def stock(compile_cache: Path) -> Iterator[Engines]:
    """Engines without the plugin."""
    process = Engines(False, compile_cache.with_name("stock.txt"), VLLM_CACHE_ROOT=str(compile_cache))
    yield process
    process.close()
