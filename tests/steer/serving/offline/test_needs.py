"""What arms need of vLLM is known, and what it can't do is refused, before anything is loaded."""

from __future__ import annotations

import importlib.machinery

import pytest
import torch

from probes.models.markers import Markers
from steer.evaluation.arms.arm import Arm
from steer.serving.offline import needs
from steer.serving.offline.needs import require_possible, settings_for
from vectors.errors import UsageError
from vectors.expression import parse
from vectors.probe import Probe, Readout
from vectors.steering import SteeringVector

MARKERS = Markers(thinking=(((5,),), ((6,),)))


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda _name: spec)


def arm(text: str, site: str = "resid_post") -> Arm:
    composition = parse(text)
    probes = {name: Probe({0: Readout(torch.ones(4), 0.0)}, {"site": site}) for name in composition.probes}
    vectors = {name: SteeringVector({1: torch.ones(4)}) for name in composition.names}
    return Arm(text, composition=composition, vectors=vectors, probes=probes)


def test_an_engine_starts_with_the_gates_layers_steps_and_markers_that_the_arms_need() -> None:
    arms = [Arm("base"), arm("v@when:mood>0 + v@answer"), arm("rotate(v, 20) + v"), Arm("prompt", system="Be warm.")]
    settings = settings_for(arms, {"thinking": ["<t>", "</t>"]})
    assert {name: settings[name] for name in ("gates", "gate_layers", "steps", "markers")} == {
        "gates": 2, "gate_layers": [0], "steps": 2, "markers": {"thinking": ["<t>", "</t>"]},
    }  # fmt: skip
    require_possible(arms, settings, MARKERS)
    assert settings_for([Arm("base"), arm("2*v")]) == needs.SETTINGS


def test_every_arm_that_vllm_cannot_run_is_refused_at_once_with_the_reason() -> None:
    many = " + ".join(f"v@while:mood>{i}" for i in range(5))
    tools, inner = "v@outside-tools", arm("v@when:mood>0", "mlp_out")
    arms = [arm(many), arm(tools), inner, arm("v@when:mood>0")]
    with pytest.raises(UsageError) as caught:
        require_possible(arms, settings_for(arms), MARKERS)
    assert len(caught.value.problems) == 3
    for problem, part in zip(
        caught.value.problems, ("has 5 conditions", "markers of tools", "mood reads mlp_out"), strict=True
    ):
        assert part in problem
    assert "--engine transformers" in caught.value.hint


def test_a_missing_vllm_is_said_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match="needs vLLM, which is not installed"):
        require_possible([Arm("base")], settings_for([]), MARKERS)
