"""Answers of a paired experiment through vLLM: those of transformers, also of a LoRA arm and of a prompt."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_process import random_vectors, save_adapter, save_model
from transformers import AutoModelForCausalLM

from steer.experiments.paired import through_transformers
from steer.experiments.paired.inputs import Inputs, read_inputs
from steer.experiments.paired.request import Request
from steer.serving.offline.engine import OfflineEngine, offline_engine
from steer.serving.offline.needs import settings_for
from vectors.events import ignore
from vectors.probe import Probe, Readout

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Request, Inputs, OfflineEngine]]:
    folder = tmp_path_factory.mktemp("paired")
    model = save_model(folder, "llama")
    random_vectors(folder)
    save_adapter(AutoModelForCausalLM.from_pretrained(model), folder / "adapter")
    arms = {
        "control": {}, "steered": {"steer": "2*warm"}, "adapter": {"lora": "adapter"}, "prompt": {"system": "be warm"},
        "twin": {"steer": "0*warm"}, "once": {"steer": "2*warm[2]@when:mood>0"},
        "each": {"steer": "3*warm[2]@while:mood>-0.5 + warm[1]@first:3@when:warm[0]>-1000"},
    }  # fmt: skip
    direction = torch.randn(128, generator=torch.Generator().manual_seed(1)) / 10
    Probe({0: Readout(direction, 0.0)}).save(folder / "mood.safetensors")
    values = {"name": "tone", "model": str(model), "arms": arms, "metric": {"name": "response_tokens"}}
    (folder / "tone.yaml").write_text(json.dumps(values))
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(f"the warm and the cold {i}") for i in range(6)))
    request = Request(
        experiment=str(folder / "tone.yaml"), prompt_file=folder / "prompts.jsonl", temperature=0.0, max_tokens=8,
        out=folder / "out", device="cpu", dtype="float32",
    )  # fmt: skip
    inputs = read_inputs(request)
    adapters = [Path(arm.model) for arm in inputs.arms if arm.model is not None]
    with offline_engine(model, settings_for(inputs.arms), max_tokens=inputs.longest + 8, adapters=adapters) as engine:
        yield request, inputs, engine


def test_every_arm_writes_what_it_writes_through_transformers(prepared: tuple[Request, Inputs, OfflineEngine]) -> None:
    from steer.serving.offline.answers import texts_of

    request, inputs, engine = prepared
    found = texts_of(engine, inputs, request, ignore)
    expected = through_transformers.write(inputs, replace(request, likelihood=False), ignore)
    for arm in expected:
        assert [each.ids for each in found[arm]] == [each.ids for each in expected[arm]], arm
        for ours, theirs in zip(found[arm], expected[arm], strict=True):
            assert [gate["condition"] for gate in ours.gates] == [gate["condition"] for gate in theirs.gates or []]
            for gate, other in zip(ours.gates, theirs.gates or [], strict=True):
                assert (gate["held"], gate["read"]) == (other["held"], other["read"])
                assert gate["value"] == pytest.approx(other["value"], abs=1e-3)
    decisions = [gate["held"] for each in expected["once"] for gate in each.gates or []]
    assert len(decisions) == len(expected["once"])
    assert len({tuple(found[arm][0].ids) for arm in ("control", "steered", "adapter", "prompt")}) == 4


def test_arms_draw_the_same_random_numbers(prepared: tuple[Request, Inputs, OfflineEngine]) -> None:
    from steer.serving.offline.answers import texts_of

    request, inputs, engine = prepared
    found = texts_of(engine, inputs, replace(request, temperature=1.0, samples=2), ignore)
    assert found["twin"] == found["control"]
    assert found["control"][0].ids != found["control"][1].ids  # two samples of one prompt
