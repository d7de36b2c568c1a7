"""What all tests share: an offline environment, pico models and their tokenizer."""

from __future__ import annotations

import functools
import os

# huggingface_hub reads these when it is imported, so they come first. XDG_CACHE_HOME stays: the bundled model is there.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does; read when torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # workers are as many as cores, and threads that wait for each other spin
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import groups
import hypothesis
import pico
import pytest
import torch
from transformers import PreTrainedTokenizerFast

hypothesis.settings.register_profile("steer", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steer")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadgroup`, a worker takes a group of tests or a single test at a time."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return groups.group_of(nodeid)

    return Groups(config, log)


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pico models are slower with more threads than one, and much slower on a busy machine; real ones are not."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("slow") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pico_model() -> Callable[..., Any]:
    """`pico.build`, each model built once; a test that changes weights calls `pico.build` itself."""
    return functools.cache(pico.build)


@pytest.fixture(params=pico.NAMES)
def architecture(request: pytest.FixtureRequest) -> str:
    """The name of every pico architecture in turn."""
    name: str = request.param
    return name


@pytest.fixture
def model(architecture: str, pico_model: Callable[..., Any]) -> Iterator[Any]:
    """A pico model of every architecture in turn, which every test leaves as it was."""
    built = pico_model(architecture)
    yield built
    assert pico.hooks(built) == 0
    assert built.config._attn_implementation == "sdpa"


@pytest.fixture
def llama(pico_model: Callable[..., Any]) -> Iterator[Any]:
    """A pico Llama, for what does not depend on the architecture."""
    built = pico_model("llama")
    yield built
    assert pico.hooks(built) == 0
    assert built.config._attn_implementation == "sdpa"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the pico models."""
    return pico.tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Llama with its tokenizer, as `save_pretrained` writes them."""
    return pico.save(tmp_path_factory.mktemp("models") / "pico-llama")
