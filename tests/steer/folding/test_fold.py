"""A folded model computes what the steered one does: on every architecture, by every injection."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from probes.steered import steered
from steer.folding import fold as folding
from steer.folding import proof
from steer.folding.effects import effects_of
from vectors.errors import ArtifactError, OutputError, SteerError, UsageError
from vectors.expression import parse
from vectors.steering import SteeringVector

WIDE = {"intermediate_size": 96}  # twice the stream, which the inserted block needs
PROMPTS = ["the warm and the cold", "yes", "user: is the cold warm?"]


def vectors(hidden: int = pico.HIDDEN, norm: float = 2.0) -> dict[str, SteeringVector]:
    generator = torch.Generator().manual_seed(3)

    def one(apply: list[int]) -> SteeringVector:
        drawn = {i: torch.randn(hidden, generator=generator) for i in range(pico.LAYERS)}
        measured = {str(i): {"projection": 1.5} for i in drawn}
        return SteeringVector(
            {i: norm * d / d.norm() for i, d in drawn.items()}, {"apply": apply, "measured": measured}
        )

    return {"warm": one([1, 2]), "calm": one([2])}


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def fold(folder: Path, composition: str, out: Path, **options: Any) -> dict[str, Any]:
    settings = {"vectors": vectors(), "prompts": PROMPTS, "vllm": False, "any_base": True, **options}
    return folding.fold(folding.FoldSettings(composition, str(folder), out, **settings))


SLOTS = ["llama", "gpt2", "gpt-neox", "phi", "starcoder2"]
ROUTES = [
    *((name, "bias") for name in SLOTS),
    *((name, "llama") for name in ("qwen2", "mistral", "phi3")),
    *((name, "layer") for name in ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2", "gemma3", "olmo2")),
    ("gemma3-window", "layer"),
    ("lfm2", "layer"),
]
# One of each kind every time; the rest where slow tests run.
QUICK = {("llama", "bias"), ("gpt2", "bias"), ("phi3", "llama"), ("qwen3", "layer"), ("gemma2", "layer")}


def slow_but(cases: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """The cases, of which all but the quick ones are slow tests."""
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("name", "via"), slow_but(ROUTES, QUICK))
def test_an_addition_is_in_the_weights(name: str, via: str, tmp_path: Path) -> None:
    folder = pico.save(tmp_path / "model", name, **(WIDE if via == "layer" else {}))
    report = fold(folder, "1.5*warm - 0.5*calm[0]", tmp_path / "out", via=via)
    assert report["proof"]["verdict"] == "equal"
    answers = report["examples"][0]["answers"]
    assert answers["folded"] == answers["composition"]
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = pico.sequences(1, 20, 20, seed=9)[0]
    with steered(original, "1.5*warm - 0.5*calm[0]", vectors=vectors(), any_base=True):
        expected = logits(original, ids)
    plain = logits(original, ids)
    assert float((logits(baked, ids) - expected).abs().max()) < 5e-4
    assert float((plain - expected).abs().max()) > 0.05
    assert (tmp_path / "out" / "tokenizer.json").is_file()


WRITERS = (
    "llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "gpt-neox", "phi", "starcoder2", "mixtral", "lfm2",
    "qwen3-next", "gemma", "gemma2", "gemma3", "olmo2",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tied"),
    slow_but(
        itertools.product(WRITERS, (False, True)),
        {("llama", True), ("gpt2", True), ("mixtral", False), ("olmo2", False), ("qwen3-next", False)},
    ),
)
def test_an_ablation_leaves_nothing_along_its_direction(name: str, tied: bool, tmp_path: Path) -> None:
    folder = pico.save(tmp_path / "model", name, tie_word_embeddings=tied)
    report = fold(folder, "ablate(calm)", tmp_path / "out")
    assert report["proof"]["verdict"] == "equal"
    assert report["proof"]["transformers"]["max_logit"] < 5e-4
    assert report["proof"]["base"]["max_logit"] > 0.01
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        ids = torch.tensor(pico.sequences(1, 20, 20))
        states = baked(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    unit = vectors()["calm"].layers[2] / 2.0
    for layer in range(3):
        assert float((states[layer + 1] @ unit).abs().max()) < 1e-4 * float(states[layer + 1].norm(dim=-1).max())


def test_additions_and_ablations_fold_together(tmp_path: Path) -> None:
    folder = pico.save(tmp_path / "model", "qwen3", **WIDE)
    report = fold(folder, "warm + ablate(calm, 0.5) + calm[0]", tmp_path / "out")
    assert report["proof"]["verdict"] == "equal"
    assert report["via"]["addition"].startswith("via layer")
    assert "not bias, because qwen3 has no bias at the end of a block" in report["via"]["addition"]


@pytest.mark.parametrize("name", ["gpt2", "phi"])
def test_a_bias_is_ablated_and_added_to(name: str, tmp_path: Path) -> None:
    folder = pico.save(tmp_path / "model", name)
    report = fold(folder, "warm + ablate(calm)", tmp_path / "out")
    assert report["proof"]["verdict"] == "equal"
    assert report["via"]["addition"].startswith("via bias")


@pytest.mark.parametrize("composition", ["warm", "ablate(calm)", "warm + ablate(calm)"])
def test_a_checkpoint_may_hold_the_stack_alone(composition: str, tmp_path: Path) -> None:
    """As the hub's GPT-2 does: h.0. and not transformer.h.0."""
    folder = pico.save(tmp_path / "model", "gpt2")
    weights = load_file(folder / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    save_file(short, folder / "model.safetensors", {"format": "pt"})
    assert fold(folder, composition, tmp_path / "out")["proof"]["verdict"] == "equal"


def test_what_is_too_weak_for_a_tolerance_is_proved_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pico.save(tmp_path / "model", "llama")
    weak = fold(folder, "0.0005*warm", tmp_path / "weak")["proof"]
    assert weak["base"]["max_logit"] < proof.LOGIT
    assert weak["verdict"] == "equal"
    original = folding.write_model

    def dropped(pending: Any, source: Any, target: Path, **options: Any) -> Any:
        return original(folding.pending_from(source, pending.pool), source, target, **options)

    monkeypatch.setattr(folding, "write_model", dropped)
    with pytest.raises(SteerError, match="the proof failed"):
        fold(folder, "0.0005*warm", tmp_path / "out")


def test_sixteen_bit_matrices_are_equal_up_to_rounding(tmp_path: Path) -> None:
    folder = pico.save(tmp_path / "model", "llama", dtype=torch.bfloat16)
    assert fold(folder, "ablate(calm)", tmp_path / "ablated")["proof"]["verdict"] == "equal up to rounding"
    assert fold(folder, "warm", tmp_path / "added")["proof"]["verdict"] == "equal"  # biases are float32


def test_one_direction_at_all_layers_is_ablated_everywhere(tmp_path: Path) -> None:
    direction = torch.randn(pico.HIDDEN, generator=torch.Generator().manual_seed(1))
    same = SteeringVector({i: direction for i in range(pico.LAYERS)})
    folder = pico.save(tmp_path / "model", "llama")
    report = fold(folder, "ablate(same)", tmp_path / "out", vectors={"same": same})
    assert "up to layer 3" in report["via"]["ablation"]
    assert report["proof"]["composition"]["kl_mean"] < report["proof"]["base"]["kl_mean"]


def test_a_proof_that_fails_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pico.save(tmp_path / "model", "llama")
    original = folding.write_model

    def damaged(pending: Any, source: Any, target: Path, **options: Any) -> Any:
        config = {key: value for key, value in pending.config.items() if key != "mlp_bias"}  # so the biases are dropped
        return original(type(pending)(pending.jobs, config, pending.pool), source, target, **options)

    monkeypatch.setattr(folding, "write_model", damaged)
    with pytest.raises(proof.ProofError, match="the proof failed, and nothing was kept"):
        fold(folder, "warm", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_beside_the_weights_travel_and_what_leaves_the_folder_is_named(tmp_path: Path) -> None:
    folder = pico.save(tmp_path / "model", "llama")
    (tmp_path / "secret").write_text("the key of somebody")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "modeling_odd.py").write_text("# code\n")
    (folder / "notes.txt").symlink_to("../secret")
    out, notes = tmp_path / "out", []
    settings = folding.FoldSettings("warm", str(folder), out, vectors=vectors(), vllm=False, any_base=True)
    folding.fold(settings, on_event=lambda event: notes.append(event.message))
    assert (out / "1_Pooling" / "config.json").is_file()
    assert not (out / "notes.txt").exists()
    card = (out / "README.md").read_text()
    assert "| `notes.txt` | a link that leaves the folder |" in card
    assert "- `modeling_odd.py`" in card
    assert any("notes.txt is not in the output" in note for note in notes)
    assert any("modeling_odd.py" in note for note in notes)


def test_the_same_fold_has_the_same_bytes(tmp_path: Path) -> None:
    folder = pico.save(tmp_path / "model", "llama")
    one, two = (fold(folder, "warm", tmp_path / name, threads=threads) for name, threads in (("a", 1), ("b", 2)))
    assert one["outputs"] == two["outputs"]
    for name in (*one["outputs"], "run.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "composition", "options", "reason"),
    [
        ("llama", "warm@response", {}, "acts on some tokens only"),
        ("llama", "clamp(warm, 2) + warm@prompt", {}, "(?s)sets the stream to a level.*|acts on some tokens only"),
        ("llama", "rotate(calm, 20) + calm%3", {}, "(?s)by an angle that keeps its norm.*a share of the token's norm"),
        ("llama", "ablate(warm, to=mean)", {}, "sets the mean at layers 1-2 in turn, but weights act once"),
        ("llama", "ablate(warm)", {}, "differs in direction between the layers 1-2"),
        ("llama", "ablate(warm[1]) + ablate(calm)", {}, "ablations act at different layers"),
        ("llama", "0*warm", {}, "changes nothing"),
        ("qwen3", "warm", {"via": "bias"}, "qwen3 has no bias at the end of a block"),
        ("qwen3", "warm", {}, "fewer than twice the 32"),
        ("mistral-window", "warm", {"via": "llama"}, "sliding window of 6"),
        ("llama", "warm", {"via": "magic"}, "there is no --via 'magic'"),
        ("gemma2", "ablate(calm, 0.5)", {}, "a direction can only be removed completely"),
        ("mixtral", "warm", {}, "not a single gated one"),
    ],
)
def test_what_can_not_be_folded_is_refused_with_the_alternative(
    name: str, composition: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = pico.save(tmp_path / "model", name)
    with pytest.raises(UsageError) as caught:
        fold(folder, composition, tmp_path / "out", **options)
    import re

    assert re.search(reason, "; ".join(caught.value.problems))
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_vectors_of_another_model_and_outputs_that_exist_are_refused(tmp_path: Path) -> None:
    folder = pico.save(tmp_path / "model", "llama")
    other = SteeringVector({0: torch.ones(16)})
    foreign = SteeringVector({0: torch.ones(32)}, {"base": {"digest": "sha256:1", "name": "another"}})
    with pytest.raises(ArtifactError, match="hidden size 16"):
        fold(folder, "other", tmp_path / "out", vectors={"other": other})
    with pytest.raises(ArtifactError, match="belongs to another"):
        fold(folder, "foreign", tmp_path / "out", vectors={"foreign": foreign}, any_base=False)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        fold(folder, "warm", tmp_path / "out")


def test_an_ablation_to_the_mean_at_one_layer_is_in_the_weights(tmp_path: Path) -> None:
    folder = pico.save(tmp_path / "model", "llama")
    report = fold(folder, "ablate(calm, to=mean)", tmp_path / "out")
    assert report["proof"]["verdict"] == "equal"
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor(pico.sequences(1, 20, 20))
    with torch.no_grad():
        states = baked(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[3]
    unit = vectors()["calm"].layers[2] / 2.0
    assert torch.allclose(states @ unit, torch.tensor(1.5 * 2.0), rtol=0, atol=1e-3)


def test_what_is_added_before_an_ablation_is_ablated_too() -> None:
    found = vectors()
    effects = effects_of(parse("calm[1] + ablate(calm)"), found)
    unit = found["calm"].layers[2].double() / found["calm"].layers[2].double().norm()
    assert abs(float(effects.added[1] @ unit)) < 1e-12
    assert bool(effects.added[1].any())
