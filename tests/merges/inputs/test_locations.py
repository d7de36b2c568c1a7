"""What references stand for: adapters of the hub, MODEL+ADAPTER, and folders whose names have a plus sign."""

from __future__ import annotations

import shutil
from pathlib import Path

import folders
import pytest
from support import shows

from merges import api
from merges.inputs import locations
from merges.recipes.recipe import Part, Recipe
from vectors.errors import SteerError

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with `org/base` and its adapter `org/lora`, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folders.adapter(here / "lora", config={"base_model_name_or_path": "org/base"})
    for name in ("base", "lora"):
        repository = here / "hub" / f"models--org--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(REVISION)
        shutil.copytree(here / name, repository / "snapshots" / REVISION)
    api.apply("base", "lora", "expected")
    return here


@shows("adapters", "`org/base+org/lora`, from the cache or fetched", "applied")
@pytest.mark.parametrize("model", ["org/base+org/lora", "base+org/lora", "org/base+lora", f"org/base@{REVISION}+lora"])
def test_a_model_with_an_adapter_may_come_from_the_hub(hub: Path, model: str) -> None:
    api.merge(Recipe("linear", (Part(model, "m", {"weight": 1.0}),)), "out")
    assert folders.same(hub / "out", hub / "expected")


@pytest.mark.parametrize("adapter", ["org/lora", f"org/lora@{REVISION}"])
def test_an_adapter_of_the_hub_finds_its_base(hub: Path, adapter: str) -> None:
    api.merge(Recipe("task_arithmetic", (Part(adapter, "m"),)), "out")
    api.apply("base", adapter, "applied")
    assert folders.same(hub / "out", hub / "expected")
    assert folders.same(hub / "applied", hub / "expected")


@shows("checkpoints", "a `+` in the name of a folder", "merged")
def test_a_plus_sign_in_the_name_of_a_folder_stays_in_it(hub: Path) -> None:
    shutil.copytree(hub / "base", hub / "c++-coder")
    assert locations.model_and_adapter("c++-coder") is None
    assert locations.model_and_adapter("c++-coder+lora") == ("c++-coder", "lora")
    api.merge(Recipe("linear", (Part("c++-coder+lora", "m", {"weight": 1.0}),)), "out")
    assert folders.same(hub / "out", hub / "expected")


def test_a_base_may_have_an_adapter_on_it(hub: Path) -> None:
    api.merge(Recipe("task_arithmetic", (Part("expected", "m"),), "base+lora", dtype="float32"), "out")
    delta = {n: t.float() for n, t in folders.read(hub / "expected").items()}
    for name, tensor in folders.read(hub / "out").items():
        assert (tensor - delta[name]).abs().max() < 0.1


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("base+nothing", "nothing is not an adapter"),
        ("base+org/none", "org/none is not an adapter"),
        ("base+a", "a is not an adapter"),
        ("base+lora+lora", "is not a plain model"),
    ],
)
def test_what_is_no_adapter_is_named(hub: Path, model: str, said: str) -> None:
    with pytest.raises(SteerError, match=said):
        api.merge(Recipe("linear", (Part(model, "m"),)), "out")


def test_a_recorded_base_that_is_not_there_is_named(here: Path) -> None:
    folders.adapter(here / "lora", config={"base_model_name_or_path": "/home/someone/models/base"})
    with pytest.raises(SteerError, match="lora names /home/someone/models/base as its base") as caught:
        api.merge(Recipe("task_arithmetic", (Part("lora", "m"),)), "out")
    assert "--base MODEL" in caught.value.hint
