"""The command line, run inside the test's process, and processes with vLLM engines."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_process import NO_V2, RUNNERS, Engines, environment_of

from steer.cli import run

NEED_VLLM = {"engines", "stock", "server"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Everything that starts an engine is slow, and needs vLLM.

    Through Triton's interpreter V2 is slow, so without a GPU it runs the tests marked `on_v2` alone, unless
    STEER_TEST_V2=all.
    """
    there = importlib.util.find_spec("vllm") is not None
    every = torch.cuda.is_available() or os.environ.get("STEER_TEST_V2") == "all"
    left_out = []
    for item in items:
        if Path(__file__).parent not in item.path.parents or not NEED_VLLM & set(item.fixturenames):  # type: ignore[attr-defined]
            continue
        item.add_marker(pytest.mark.slow)
        if not there:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make setup, on Linux"))
        if hasattr(item, "callspec") and item.callspec.params.get("runner") == "v2":
            item.add_marker(pytest.mark.v2)
            if not every and item.get_closest_marker("on_v2") is None:
                left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture
def steer(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session", params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> str:
    """vLLM's model runner, of which each test of an engine runs on both."""
    name: str = request.param
    if environment_of(name) is None:
        pytest.skip(NO_V2)
    return name


@pytest.fixture(scope="session")
def compile_cache(runner: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's cache of compiled graphs, which the engines with and without the plugin share."""
    return tmp_path_factory.mktemp(f"engines-{runner}") / "cache"


@pytest.fixture(scope="session")
def engine_environment(runner: str, compile_cache: Path) -> dict[str, str]:
    """The environment of an engine's process."""
    return {"VLLM_CACHE_ROOT": str(compile_cache)} | (environment_of(runner) or {})


@pytest.fixture(scope="session")
def engines(compile_cache: Path, engine_environment: dict[str, str]) -> Iterator[Engines]:
    """Engines with the plugin."""
    process = Engines(True, compile_cache.with_name("log.txt"), **engine_environment)
    yield process
    process.close()


@pytest.fixture(scope="session")
def stock(compile_cache: Path, engine_environment: dict[str, str]) -> Iterator[Engines]:
    """Engines without the plugin."""
    process = Engines(False, compile_cache.with_name("stock.txt"), **engine_environment)
    yield process
    process.close()
