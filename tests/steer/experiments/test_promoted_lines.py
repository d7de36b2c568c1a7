"""The commands that `steer ab promote` prints hold every part of the arm, and are those that the commands take."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import trials

from steer.cli import requests
from steer.cli.commands import bake, serve
from steer.experiments import document, promotion
from steer.training.modes.fold import FoldRequest

SYSTEM = 'Say "ahoy".\nrm -rf is no answer; it\'s $HOME'
PARTS = {"steer": "1.2*warm", "lora": "an adapter", "system": SYSTEM}


def lines(folder: Path, *parts: str, moved: promotion.Moved | None = None, **changes: str) -> list[str]:
    (folder / "an adapter").mkdir()
    (folder / "an adapter" / "adapter_config.json").write_text('{"r": 24}')
    (folder / "an adapter" / "adapter_model.safetensors").touch()
    arm = {part: PARTS[part] for part in parts} | changes
    experiment = document.read(trials.written(folder, arms={"control": {}, "friendly": arm}))
    found = experiment.arm("friendly")
    assert found is not None
    return promotion.lines_of(found, experiment, "org/a model", moved, 32)


def taken(line: str, command: Any, request: Any) -> tuple[Any, list[str]]:
    """The request that a command makes of a line as a shell splits it, and the flags for vLLM."""
    assert "\n" not in line
    words = shlex.split(line, comments=True)
    values = command.make_context(words[1], words[2:]).params
    flags = list(values.pop("flags", ()))
    values.pop("mode", None)
    names = {field.name for field in requests.fields_of(request)}
    return requests.build(request, {key: value for key, value in values.items() if key in names}), flags


@pytest.mark.parametrize(
    "parts", [("steer",), ("lora",), ("system",), ("steer", "system"), ("lora", "steer"), ("lora", "system"), PARTS]
)
def test_the_line_that_serves_an_arm_has_all_its_parts(parts: tuple[str, ...], tmp_path: Path) -> None:
    line = lines(tmp_path, *parts)[0]
    request, flags = taken(line, serve.command, serve.Request)
    assert request.model == "org/a model"
    if "steer" in parts:
        assert (request.arms, request.vectors) == ({"friendly": "1.2*warm"}, {"warm": tmp_path / "warm.safetensors"})
    else:
        assert (request.arms, request.vectors) == ({}, {})
    if "lora" in parts:
        module = {"name": "friendly", "path": str(tmp_path / "an adapter")}
        assert flags == ["--enable-lora", "--max-lora-rank", "32", "--lora-modules", json.dumps(module)]
    assert bool(flags) == ("lora" in parts)
    assert ("the model friendly:friendly" in line) == ({"lora", "steer"} <= {*parts})  # alone it would not be steered
    assert (json.dumps(SYSTEM) in line.partition("    # ")[2]) == ("system" in parts)


def test_the_line_that_bakes_an_arm_is_there_where_weights_can_do_the_same(tmp_path: Path) -> None:
    line = lines(tmp_path, "steer", "system")[1]
    request, _ = taken(line, bake.command, FoldRequest)
    assert (request.composition, request.model, request.out) == ("1.2*warm", "org/a model", Path("friendly-model"))
    assert json.dumps(SYSTEM) in line.partition("    # served with ")[2]


@pytest.mark.parametrize("parts", [("lora", "steer"), ("lora",), ("system",), ()])
def test_no_weights_are_promised_for_other_parts(parts: tuple[str, ...], tmp_path: Path) -> None:
    assert len(lines(tmp_path, *parts, **({} if parts else {"steer": "warm[3]@when:warm[1]>0"}))) == 1


def test_a_version_of_the_store_is_served_with_the_other_parts(tmp_path: Path) -> None:
    line = lines(tmp_path, *PARTS, moved=moved("org/a model", Path.cwd()))[0]
    words = shlex.split(line, comments=True)
    assert words[:6] == ["steer", "serve", "tone@champion", "--", "--enable-lora", "--max-lora-rank"]
    assert "the model friendly:champion and the system prompt" in line


def test_a_version_is_served_from_its_folder_on_the_model_of_the_experiment(tmp_path: Path) -> None:
    serving, baking = lines(tmp_path, "steer", moved=moved("smollm2", tmp_path / "a store"))
    enter = f"cd '{tmp_path}/a store' && "
    assert serving.startswith(enter)
    assert baking.startswith(enter + "steer bake tone@champion --model 'org/a model' ")
    request, _ = taken(serving.removeprefix(enter), serve.command, serve.Request)
    assert (request.model, request.arms) == ("org/a model", {"friendly": "'tone@champion'"})


def moved(base: str, folder: Path) -> promotion.Moved:
    return promotion.Moved("tone@champion", "sha256:0", None, base, str(folder))


def test_the_control_is_the_model_itself(tmp_path: Path) -> None:
    experiment = document.read(trials.written(tmp_path))
    assert promotion.lines_of(experiment.control, experiment, "smollm2") == ["steer serve smollm2"]
