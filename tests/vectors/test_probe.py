"""Probe: what is written is what is read, and a file of anything else is refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vectors import artifact, fit
from vectors.errors import ArtifactError
from vectors.probe import Probe, Readout, is_probe, reading_of
from vectors.steering import SteeringVector

BASE = {"digest": "sha256:" + "a" * 64, "architecture": "LlamaForCausalLM", "name": "m"}
METADATA: dict[str, Any] = {
    "base": BASE,
    "method": {"name": "logistic", "parameters": {"tokens": "last", "seed": 0}},
    "measured": {"3": {"auroc": 0.9, "brier": None}},
    "recommended": {"layer": 3, "reason": "the best"},
    "thresholds": {"3": 1.25},
    "data": {"example_digests": ["0" * 16]},
}


def probe(**changes: Any) -> Probe:
    layers = {5: Readout(torch.arange(4.0), -0.5), 3: Readout(torch.tensor([1.0, -2.0, 0.0, 1e-30]), 0.1)}
    return Probe(layers, METADATA | changes)


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    digest = probe().save(tmp_path / "p.safetensors")
    found = Probe.load(tmp_path / "p.safetensors")
    assert found.digest == digest == probe().digest
    assert list(found.layers) == [3, 5]
    assert torch.equal(found.layers[3].weight, probe().layers[3].weight)
    assert found.layers[3].bias == probe().layers[3].bias
    assert found.metadata == METADATA
    assert Probe.decode((tmp_path / "p.safetensors").read_bytes()).digest == digest


def test_a_score_is_the_product_with_the_weight_and_the_bias() -> None:
    states = torch.randn(2, 3, 4)
    weight, bias = probe().at(5)
    torch.testing.assert_close(probe().at(5).scores(states), (states * weight).sum(-1) + bias)
    assert probe().at(5).scores(states.bfloat16()).dtype == torch.float32


def test_the_layer_that_is_read_is_the_recommended_one_and_else_the_middle_one() -> None:
    assert probe().layer == 3
    assert probe().threshold == 1.25
    assert probe(recommended=None).layer == 5
    assert probe(recommended=None).threshold == 0.0
    with pytest.raises(ArtifactError, match="the probe holds no layer 4"):
        probe().at(4)


def test_changing_the_tensors_that_it_was_made_of_does_not_change_a_probe() -> None:
    weight = torch.ones(4)
    made = Probe({0: Readout(weight, 0.0)})
    weight += 1
    assert torch.equal(made.layers[0].weight, torch.ones(4))


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ({}, "at least one layer"),
        ({-1: Readout(torch.ones(2), 0.0)}, "layer -1 is negative"),
        ({0: Readout(torch.ones(2, 2), 0.0)}, r"layer 0 has shape \[2, 2\]"),
        ({0: Readout(torch.tensor([1.0, float("nan")]), 0.0)}, "layer 0 holds values that are not finite"),
        ({0: Readout(torch.ones(2), float("inf"))}, "layer 0 holds values that are not finite"),
        ({0: Readout(torch.ones(2), 0.0), 1: Readout(torch.ones(3), 0.0)}, "different hidden sizes: 2, 3"),
    ],
)
def test_what_is_no_probe_is_refused(layers: dict[int, Readout], problem: str) -> None:
    with pytest.raises(ArtifactError, match=problem):
        Probe(layers)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"recommended": {"layer": 4}}, "it recommends layer 4, which it lacks"),
        ({"thresholds": {"7": 0.5}}, "it has a threshold for layer 7, which it lacks"),
        ({"thresholds": {"3": "high"}}, 'thresholds.3 is "high", not a finite number'),
        ({"thresholds": {"x": 1.0}}, 'thresholds has the key "x"'),
        ({"site": 5}, "site is 5, not text that is not empty"),
        ({"hidden_size": 7}, "its metadata has hidden size 7, its weights 4"),
    ],
)
def test_metadata_that_do_not_fit_are_refused_on_reading(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    tensors = {"layer.3.weight": torch.ones(4), "layer.3.bias": torch.ones(1)}
    artifact.write(tmp_path / "p.safetensors", tensors, {"kind": "probe"} | METADATA | changes)
    with pytest.raises(ArtifactError, match=problem):
        Probe.load(tmp_path / "p.safetensors")


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"layer.3.weight": torch.ones(4)}, "holds no layer.3.bias"),
        ({"layer.3.weight": torch.ones(4), "layer.3.bias": torch.ones(2)}, r"layer.3.bias .* is F32 \[2\], not F32"),
        ({"layer.3.weight": torch.ones(4).half(), "layer.3.bias": torch.ones(1)}, r"layer.3.weight .* is F16 \[4\]"),
        ({"layer.1001.weight": torch.ones(4), "layer.1001.bias": torch.ones(1)}, "has a layer 1001"),
        ({"layer.3": torch.ones(4)}, "holds layer.3, which are not tensors of a probe"),
        ({}, "holds no layer"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_on_reading(
    tmp_path: Path, tensors: dict[str, torch.Tensor], problem: str
) -> None:
    artifact.write(tmp_path / "p.safetensors", tensors, {"kind": "probe"})
    with pytest.raises(ArtifactError, match=problem):
        Probe.load(tmp_path / "p.safetensors")


def test_a_probe_is_no_steering_vector_and_a_steering_vector_no_probe(tmp_path: Path) -> None:
    probe().save(tmp_path / "p.safetensors")
    SteeringVector({3: torch.ones(4)}).save(tmp_path / "v.safetensors")
    assert is_probe(tmp_path / "p.safetensors")
    assert not is_probe(tmp_path / "v.safetensors")
    assert not is_probe(tmp_path / "absent.safetensors")
    with pytest.raises(ArtifactError, match="holds a probe, not a steering-vector") as caught:
        SteeringVector.load(tmp_path / "p.safetensors")
    assert "@when:" in caught.value.hint
    with pytest.raises(ArtifactError, match='of the kind "steering-vector", not a probe'):
        Probe.load(tmp_path / "v.safetensors")


def test_a_probe_of_another_model_is_refused_with_every_reason() -> None:
    other = {"digest": "sha256:" + "b" * 64, "name": "other"}
    assert fit.problems_of_probe("p", probe(), hidden_size=4, layers=6, base=BASE) == []
    assert fit.problems_of_probe("p", probe(), hidden_size=5, layers=4, base=other) == [
        "the probe p has hidden size 4, the model 5",
        "the probe p has layer 5; the model has layers 0 to 3",
        "the probe p was trained on m, not on other",
    ]
    assert fit.problems_of_probe("p", probe(), hidden_size=4, layers=6, base=other, any_base=True) == []
    assert fit.problems_of_probe("p", probe(site="attn_out"), hidden_size=9, layers=6, base=BASE) == []


def test_a_condition_reads_a_probe_at_its_default_layer_and_a_vector_in_units_of_strength() -> None:
    probe = Probe({2: Readout(torch.ones(4), -1.0), 3: Readout(torch.zeros(4), 0.0)}, {"recommended": {"layer": 2}})
    assert reading_of(probe)[0] == 2
    assert float(reading_of(probe)[1].scores(torch.ones(4))) == 3.0
    directions = {1: torch.tensor([3.0, 4.0]), 2: torch.tensor([0.0, 2.0]), 3: torch.zeros(2)}
    for recommended, layer in (
        ({}, 2),
        ({"recommended": {"layer": 1}}, 1),
        ({"recommended": {"layers": [1]}}, 1),
        ({"recommended": {"strength": 2.0}}, 2),
    ):
        vector = SteeringVector(directions, recommended)
        read, readout = reading_of(vector)
        assert read == layer
        for strength in (-1.5, 0.0, 2.0):
            assert float(readout.scores(strength * directions[layer])) == pytest.approx(strength)
    assert not reading_of(SteeringVector({3: torch.zeros(2)}))[1].weight.any()
