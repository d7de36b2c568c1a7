"""Arms through vLLM: the same effects and divergences as through hooks in transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import engine_process
import pytest
import torch

from probes.data.examples import Example
from probes.models.loading import load, open_model
from steer.evaluation.arms.arm import Arm
from steer.evaluation.measuring import divergences, figures, generations
from steer.evaluation.suites.items import Choice, Pair
from vectors.errors import ModelError
from vectors.events import ignore
from vectors.expression import parse
from vectors.probe import Probe, Readout
from vectors.steering import SteeringVector

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

ITEMS = [
    Pair(Example("How lovely to hear from you!", "I am back."), Example("Noted.", "I am back."), id="a"),
    Pair(Example("I would be so glad to help you.", "Can you help?"), Example("What is it?", "Can you help?"), id="b"),
    Choice("Are you glad?", ("yes", "no"), 0, letters=False, id="c"),
]
NEUTRAL = ["What is an algorithm?", "Name a river."]


MARKERS = {"thinking": ["lovely", "hear"]}  # of a section within the first item's completion
CONDITIONS = (
    "2*v@when:mood>0", "1.5*v@while:mood>0 + w@response", "2.5*v@answer", "v@answer@while:w[0]<0 - w@thinking",
    "v + rotate(w, 20)",
)  # fmt: skip
EXPRESSIONS = ("1.5*v", "-1.5*v", "ablate(w) + v@prompt", "2*v@first:4", "2*v@response", "0.5*v - 1.2*w")


def arms_of(
    vectors: dict[str, SteeringVector], expressions: Sequence[str], probes: Mapping[str, Probe | SteeringVector]
) -> list[Arm]:
    steered = [Arm(text, composition=parse(text), vectors=vectors, probes=probes) for text in expressions]
    other = Arm("donor", composition=parse("v"), vectors={"v": vectors["w"]})  # the same name, another vector
    return [Arm("base"), *steered, other, Arm("prompt", system="Answer warmly.")]


def difference(
    model: Path, vectors: dict[str, SteeringVector], tokens: int, expressions: Sequence[str],
    probes: Mapping[str, Probe | SteeringVector] = {},
) -> tuple[float, float]:  # fmt: skip
    """The greatest differences of figures and of divergences between the two engines, in nats."""
    from steer.serving.offline import arms as through_vllm

    opened = open_model(model)
    loaded = load(opened, "cpu", "float32", MARKERS)
    arms = arms_of(vectors, expressions, probes)
    expected = figures.measure_arms(loaded, ITEMS, arms)
    neutral = divergences.neutral_text(loaded, NEUTRAL, tokens=tokens)
    expected_kl = divergences.measure_divergences(loaded, neutral, arms)
    with through_vllm.through_vllm(opened, arms, MARKERS)(loaded, ignore) as vllm:
        engine = vllm.engine
        found = vllm.measure_arms(ITEMS, arms)
        kl = vllm.measure_divergences(neutral, arms)
        assert vllm.generate_arms(arms, NEUTRAL, 6) == generations.generate_arms(loaded, arms, NEUTRAL, max_tokens=6)
        with pytest.raises(ModelError, match="vLLM can't measure"):
            engine.likelihoods([through_vllm.Request([5] * 3000, 1)])  # longer than the context
        assert engine.likelihoods([through_vllm.Request([5, 6, 7], 1)])  # and the engine goes on
    assert len({round(float(row.sum()), 3) for row in expected}) == len(arms)  # every arm differs
    assert [len(each) for each in kl] == [len(each) for each in expected_kl]
    return float((found - expected).abs().max()), float((torch.stack(kl) - torch.stack(expected_kl)).abs().max())


def test_all_arms_in_one_batch_have_the_figures_of_transformers_on_a_pico_model(tmp_path: Path) -> None:
    folder = engine_process.save_model(tmp_path, "llama")
    generator = torch.Generator().manual_seed(5)

    def direction() -> torch.Tensor:
        return 3 * torch.nn.functional.normalize(torch.randn(128, generator=generator), dim=0)

    vectors = {name: SteeringVector({0: direction(), 1: direction()}, {"apply": [1]}) for name in ("v", "w")}
    mood = Probe({0: Readout(direction() / 3, 0.0)})
    effect, kl = difference(folder, vectors, 8, [*EXPRESSIONS, *CONDITIONS], {"mood": mood, "w": vectors["w"]})
    assert effect < 1e-3
    assert kl < 1e-3


def test_effects_and_divergences_on_smollm2_agree_within_a_thousandth() -> None:
    generator = torch.Generator().manual_seed(6)
    vectors = {
        name: SteeringVector({12: 25 * torch.nn.functional.normalize(torch.randn(576, generator=generator), dim=0)})
        for name in ("v", "w")
    }
    effect, kl = difference(Path("smollm2"), vectors, 6, EXPRESSIONS[-2:])
    assert effect < 1e-3
    assert kl < 1e-3
