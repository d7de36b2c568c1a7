"""Exports of an evaluation: a log that Inspect has read, and a steering file that lm-evaluation-harness applies."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pico
import pytest
import torch

from probes.steered import steered
from steer.evaluation.arms.arm import Arm
from steer.evaluation.exports import harness_vector, inspect_log
from steer.evaluation.exports.inspect_log import Metric, Sample
from vectors.errors import UsageError
from vectors.expression import parse
from vectors.formats import lm_eval as lm_eval_format
from vectors.steering import SteeringVector

FIXTURE = Path(__file__).parent / "inspect_log.json"  # inspect_ai 0.3.285 has read these bytes

SAMPLES = [
    Sample("a1", "How was it?", "Lovely!", None, {"margin": 0.25}, group="small talk"),
    Sample("b2", "I lost my keys.", "", "Oh no, I am sorry!", {"apology": 1.0, "judge": None},
           {"judge": "the judge gave no rating"}),
]  # fmt: skip
METRICS = [Metric("margin", 0.25, -0.1, 0.6), Metric("apology", 1.0, 0.2, 1.0), Metric("judge", None)]


def log() -> dict[str, object]:
    config = {"expression": "1.5*warm", "vectors": {"warm": "sha256:00"}, "seed": 0}
    return inspect_log.inspect_log(
        "warmth", "1.5*warm", SAMPLES, METRICS, model="smollm2", config=config, version="0.1"
    )


def test_a_log_is_the_one_that_inspect_has_read(tmp_path: Path) -> None:
    inspect_log.write(tmp_path / "log.json", log())
    assert (tmp_path / "log.json").read_bytes() == FIXTURE.read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("inspect_ai") is None, reason="needs inspect-ai")
def test_inspect_lists_and_reads_the_log(tmp_path: Path) -> None:
    from inspect_ai.log import list_eval_logs, read_eval_log

    inspect_log.write(tmp_path / inspect_log.file_name("1.5*warm"), log())
    assert len(list_eval_logs(str(tmp_path))) == 1

    read = read_eval_log(str(FIXTURE))
    assert read.status == "success"
    assert read.samples is not None
    assert read.results is not None
    assert [sample.id for sample in read.samples] == ["a1", "b2"]
    assert read.samples[1].output.completion == "Oh no, I am sorry!"
    assert read.samples[1].scores is not None
    assert read.samples[1].scores["apology"].value == 1
    assert read.samples[1].metadata["missing"] == {"judge": "the judge gave no rating"}
    assert {score.name: score.metrics["mean"].value for score in read.results.scores} == {"margin": 0.25, "apology": 1}


def test_samples_of_all_arms_have_the_same_ids_and_every_arm_its_file() -> None:
    one, other = log(), log()
    assert one == other
    names = {
        inspect_log.file_name(arm) for arm in ("1.5*warm", "-1.5*warm", "", "prompt: Sei freundlich!", "1.5*warm ")
    }
    assert len(names) == 5
    # What Inspect lists: a time, and one part behind it.
    assert all(re.fullmatch(r"\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}_[^_/]+\.json", name) for name in names)


def arm(text: str, **vectors: SteeringVector) -> Arm:
    return Arm(text, composition=parse(text), vectors=vectors)


def random_vector(seed: int, *layers: int) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({layer: torch.randn(pico.HIDDEN, generator=generator) for layer in layers})


def test_terms_at_one_layer_become_one_hook_point(tmp_path: Path) -> None:
    v, w = random_vector(0, 2), random_vector(1, 2)
    harness_vector.write(tmp_path / "arm.pt", arm("1.5*v - 0.5*w", v=v, w=w))
    entries = torch.load(tmp_path / "arm.pt", weights_only=True)
    assert list(entries) == ["layers.2"]
    assert entries["layers.2"]["action"] == "add"
    assert entries["layers.2"]["bias"] is None
    total = entries["layers.2"]["steering_coefficient"] * entries["layers.2"]["steering_vector"]
    torch.testing.assert_close(total, 1.5 * v.layers[2] - 0.5 * w.layers[2])
    with pytest.warns(UserWarning, match="unverified"):  # the format does not record the base
        torch.testing.assert_close(lm_eval_format.read(tmp_path / "arm.pt").layers[2], total)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("v", "acts at layers 1-2"),
        ("v[1] + w", "acts at layers 1,3"),
        ("ablate(w)", "can only add"),
        ("v[1]@response", "has scopes"),
        ("v[1]@when:w>1", "has conditions"),
    ],
)
def test_what_one_hook_point_can_not_hold_is_refused_with_the_reason(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        harness_vector.write(tmp_path / "arm.pt", arm(text, v=random_vector(0, 1, 2), w=random_vector(1, 3)))
    assert problem in str(caught.value)
    assert not (tmp_path / "arm.pt").exists()


def test_arms_without_vectors_and_with_a_prompt_are_refused() -> None:
    assert harness_vector.problems_of(Arm("prompt", system="Be warm.")) == ["prompt steers by no vector"]
    prompted = Arm("both", composition=parse("v"), vectors={"v": random_vector(0, 1)}, system="Be warm.")
    assert "system prompt" in harness_vector.problems_of(prompted)[0]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval")
def test_the_harness_steers_with_the_file_as_our_hooks_do(tmp_path: Path, model_folder: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.hf_steered import SteeredModel

    v = random_vector(0, 2)
    harness_vector.write(tmp_path / "arm.pt", arm("1.5*v", v=v))
    theirs = SteeredModel(
        pretrained=str(model_folder), steer_path=str(tmp_path / "arm.pt"), dtype="float32", device="cpu"
    )
    pair = ("the warm and", " the cold")
    ((likelihood, _),) = theirs.loglikelihood([Instance("loglikelihood", {}, pair, 0)])
    ids, whole = (pico.tokenizer()(text)["input_ids"] for text in (pair[0], "".join(pair)))
    model = pico.build("llama")
    with torch.no_grad(), steered(model, "1.5*v", vectors={"v": v}):
        logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    expected = sum(float(logits[i - 1, whole[i]]) for i in range(len(ids), len(whole)))
    assert likelihood == pytest.approx(expected, abs=1e-4)
