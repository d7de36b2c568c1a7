"""Distillation on pico models: the student learns what the steered or prompted teacher predicts."""

from __future__ import annotations

import json
from pathlib import Path

import pico
import pytest
import torch
from bakes import distilled, files, short
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from merges import api
from merges.recipes.recipe import Part, Recipe
from probes.data.examples import Example, Message
from steer.training.api import bake
from steer.training.data import teachers
from steer.training.modes.distil import DistilRequest
from steer.training.requests import Replay
from vectors.steering import SteeringVector
from vectors.storage.runs import report_of
from vectors.task import TaskVector


def test_a_student_learns_what_the_steered_teacher_predicts(
    folder: Path, vector: SteeringVector, asked: Path, tmp_path: Path
) -> None:
    report = distilled(folder, vector, asked, tmp_path / "out", settings={"steps": 120}, replay=Replay(None, 0.1))
    models = report["models"]
    assert models["base"]["kl_teacher"] > 0.05
    assert models["steered"]["kl_teacher"] < 1e-3
    assert report["dose"]["kl"] > 0.7
    assert models["baked"]["kl_neutral"] < models["steered"]["kl_neutral"]
    written = report_of(json.loads((tmp_path / "out" / "run.json").read_text()))
    assert written["models"] == models
    assert written["samples"]["training"] == written["samples"]["behaviour"] + written["samples"]["general"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in page
    assert {"base", "steered", "baked"} == set(report["examples"][0]["answers"])
    assert "Example answers" in page
    assert not list(tmp_path.glob(".out*"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_same_seed_gives_the_same_bytes(folder: Path, vector: SteeringVector, asked: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        distilled(folder, vector, asked, tmp_path / name)
    distilled(folder, vector, asked, tmp_path / "c", settings={"seed": 1})
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["model.safetensors"] != files(tmp_path / "c")["model.safetensors"]


def test_a_vector_and_an_adapter_say_the_same_as_the_model(
    folder: Path, vector: SteeringVector, asked: Path, tmp_path: Path
) -> None:
    for kind, name in (("model", "model"), ("vector", "v.safetensors"), ("lora", "lora")):
        distilled(folder, vector, asked, tmp_path / name, as_=kind)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    task = TaskVector.open(tmp_path / "v.safetensors")
    assert all("layers.0." not in name for name in task.parameters), "layer 0 lies below the vector's"
    for number, part in enumerate((tmp_path / "v.safetensors", tmp_path / "lora")):
        recipe = Recipe("task_arithmetic", (Part(str(part), "bake", {"weight": 1.0}),), str(folder))
        api.merge(recipe, tmp_path / f"again{number}")
        again = load_file(tmp_path / f"again{number}" / "model.safetensors")
        assert all(torch.allclose(again[name], weights[name], atol=1e-6) for name in weights)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert str(tmp_path) not in json.dumps(config)
    assert (tmp_path / "v.run.json").is_file()


@pytest.mark.filterwarnings("ignore:the prompts of 20 of the 25 examples")
def test_a_prompt_can_be_the_teacher(folder: Path, asked: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    text = "warm warm warm the sun is warm"
    fields = short(folder, tmp_path / "out", {"settings": {"steps": 60}, "pos": texts[0], "neg": texts[1]})
    report = bake(DistilRequest(teacher_prompt=text, prompts=asked, tokens=8, **fields))
    assert report["dose"]["kl"] > 0.3
    base, prompted, baked = (report["models"][name]["margin"] for name in ("base", "prompted", "baked"))
    assert prompted != base
    assert report["dose"]["margin"] == pytest.approx((baked - base) / (prompted - base))
    assert report["behaviour"] == text


def test_a_prompted_teacher_sees_examples_with_the_prompt_where_there_is_a_place_for_it() -> None:
    told = teachers.by_prompt("Be warm.").as_prompted
    plain, chat = pico.tokenizer(), pico.tokenizer()
    plain.chat_template = None
    asked, text = Example(" yes", "Is it?"), Example("a text")
    talk = Example(" yes", (Message("user", "Is it?"),))
    ruled = Example(" yes", (Message("system", "Be short."), *talk.context))
    assert [e.context for e in told([asked, text], plain)] == ["Be warm.\n\nIs it?", "Be warm.\n\n"]
    wanted = (Message("system", "Be warm."), Message("user", "Is it?"))
    assert [e.context for e in told([asked, talk], chat)] == [wanted, wanted]
    assert told([ruled], chat)[0].context[0] == Message("system", "Be warm.\n\nBe short.")
    assert told([asked._replace(context=f"{chat.bos_token}Is it?")], chat) is None
    assert told([text], chat) is None
