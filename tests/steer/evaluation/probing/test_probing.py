"""Probes from examples to figures: planted directions are found, and what must be refused is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from planted_texts import DISTANCE, direction, lines

import steer
from probes.data.examples import Example
from probes.readouts.gate import Gate, sides
from probes.readouts.gate import gate as choose_threshold
from probes.readouts.methods import methods
from probes.readouts.thresholds import Rate, Threshold
from steer.evaluation.probing.gate import Gated, gate
from steer.evaluation.probing.measure import IN, OUT, measure
from steer.evaluation.probing.train import train
from vectors.errors import ArtifactError, ExampleError, SteerError, UsageError
from vectors.probe import Probe, Readout

Texts = Callable[..., Path]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


@pytest.fixture(scope="module")
def probe(planted_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Probe:
    folder = tmp_path_factory.mktemp("training")
    warm, cold = lines(folder / "w.jsonl", " warm", 60, 1), lines(folder / "c.jsonl", " cold", 60, 2)
    return train(warm, cold, model=planted_model, layers="1,2", method="lda").probe


@pytest.mark.parametrize("method", methods())
def test_a_planted_direction_is_found_and_tells_the_classes_apart(
    planted_model: Path, texts: Texts, method: str
) -> None:
    trained = train(texts(" warm", 60, 1), texts(" cold", 60, 2), model=planted_model, layers="2", method=method)
    if method in ("diffmean", "logistic"):  # the others turn away from where the letters' embeddings vary
        assert cosine(trained.probe.layers[2].weight, direction()) > 0.9
    assert float(trained.probe.layers[2].weight @ direction()) > 0
    assert trained.figures[2].auroc == 1.0
    assert trained.figures[2].auroc_low > 0.9
    assert trained.figures[2].confusion == (60, 0, 0, 60)
    assert trained.figures[2].brier < 0.02


def test_every_token_can_be_an_example_and_the_greatest_score_that_of_a_text(planted_model: Path, texts: Texts) -> None:
    trained = train(
        texts(" warm", 40, 1), texts(" cold", 40, 2), model=planted_model, layers="0", per_token=True, pool="max",
        method="diffmean",
    )  # fmt: skip
    assert cosine(trained.probe.layers[0].weight, direction()) > 0.85
    assert trained.figures[0].auroc > 0.99


def test_the_figures_do_not_depend_on_the_order_of_the_examples(planted_model: Path, texts: Texts) -> None:
    warm, cold = texts(" warm", 20, 1), texts(" cold", 20, 2)
    first = train(warm, cold, model=planted_model, layers="2")
    for file in (warm, cold):
        file.write_text("\n".join(reversed(file.read_text().splitlines())))
    second = train(warm, cold, model=planted_model, layers="2")
    assert first.figures[2].brier == pytest.approx(second.figures[2].brier, abs=1e-6)
    torch.testing.assert_close(first.probe.layers[2].weight, second.probe.layers[2].weight, rtol=1e-4, atol=1e-5)


def test_copies_of_a_text_do_not_make_a_probe_look_better_than_it_is(planted_model: Path, texts: Texts) -> None:
    """Six texts without a difference between the classes, each many times: held out, they are at chance or below."""
    first, second = texts("", 6, 1), texts("", 6, 2)
    for file in (first, second):
        file.write_text("\n".join([file.read_text()] * 10))
    trained = train(first, second, model=planted_model, layers="2")
    assert trained.figures[2].auroc < 0.75


def test_a_probe_is_tested_on_other_texts_in_and_out_of_its_distribution(
    planted_model: Path, probe: Probe, texts: Texts
) -> None:
    found = measure(
        probe, texts(" warm", 30, 3), texts(" cold", 30, 4), ood_pos=texts(" warm and the", 30, 5),
        ood_neg=texts(" and the", 30, 6), model=planted_model,
    )  # fmt: skip
    assert found.sets[IN].figures.auroc == 1.0
    assert 0.5 < found.sets[OUT].figures.auroc <= 1.0
    assert found.sets[OUT].figures.cross_entropy > found.sets[IN].figures.cross_entropy
    assert found.report()["out_of_distribution_less_in"]["cross_entropy"] > 0


def test_texts_that_a_probe_was_trained_on_are_refused_unless_allowed(
    planted_model: Path, probe: Probe, texts: Texts
) -> None:
    warm, cold = texts(" warm", 60, 1), texts(" cold", 30, 4)
    with pytest.raises(ExampleError, match="the probe was trained on 60 of the 90 examples") as caught:
        measure(probe, warm, cold, model=planted_model)
    assert "--allow-overlap" in caught.value.hint
    with pytest.raises(ExampleError, match="the probe was trained on 60 of the 60 examples of --neg"):
        gate(probe, warm, model=planted_model)
    allowed = measure(probe, warm, cold, model=planted_model, allow_overlap=True)
    assert "was trained on 60" in allowed.report()["warnings"][0]


@pytest.mark.parametrize("tokens", ["completion", "last", "prompt", "all"])
def test_every_choice_of_tokens_can_be_trained_and_tested(planted_model: Path, texts: Texts, tokens: str) -> None:
    """The last token of a rendered prompt is a newline, which says nothing here."""
    prompts = tokens == "prompt"
    warm, cold = texts(" warm", 20, 1, prompts), texts(" cold", 20, 2, prompts)
    if prompts:
        with pytest.raises(ExampleError, match="are the same at layer 2"):
            train(warm, cold, model=planted_model, layers="2", tokens=tokens)
        return
    trained = train(warm, cold, model=planted_model, layers="2", tokens=tokens)
    found = measure(trained.probe, texts(" warm", 9, 3), texts(" cold", 9, 4), model=planted_model)
    assert found.tokens == tokens
    assert found.sets[IN].figures.auroc == 1.0


def test_classes_that_are_the_same_to_the_model_are_refused(planted_model: Path) -> None:
    same = [{"prompt": text, "completion": " warm"} for text in ("a", "b", "c")]
    other = [{"prompt": text, "completion": " warm"} for text in ("d", "e", "f")]
    with pytest.raises(ExampleError, match="the activations of both classes are the same at layer 1"):
        train(same, other, model=planted_model, layers="1")


def test_everything_wrong_with_a_request_is_said_at_once_and_before_a_model_is_read() -> None:
    with pytest.raises(SteerError) as caught:
        train(
            ["a"], None, model="/absent", method="svm", tokens="many", layers="x", pool="median", site="nowhere",
            device="abacus", dtype="int3",
        )  # fmt: skip
    text = " ".join(caught.value.problems)
    for part in ("svm", "many", "'x'", "median", "nowhere", "abacus", "int3", "--neg is missing"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"pool": "max"}, "--pool max needs the scores of tokens"),
        ({"layers": "9"}, "layer 9 is out of range"),
        ({"site": "blocks.3.hook_q"}, "does not say where the layer stands"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    planted_model: Path, texts: Texts, arguments: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SteerError, match=problem):
        train(texts(" warm", 4, 1), texts(" cold", 4, 2), model=planted_model, **arguments)


def test_a_probe_of_another_model_is_refused_unless_allowed(probe: Probe, model_folder: Path, texts: Texts) -> None:
    with pytest.raises(ArtifactError, match="the probe that was given was trained on"):
        measure(probe, texts(" warm", 4, 3), texts(" cold", 4, 4), model=model_folder)
    assert measure(probe, texts(" warm", 4, 3), texts(" cold", 4, 4), model=model_folder, any_base=True).sets


# Thresholds for gates


def test_a_gates_false_positive_rate_is_as_stated_on_the_other_half(
    planted_model: Path, probe: Probe, texts: Texts, tmp_path: Path
) -> None:
    found = gate(
        probe, texts("", 300, 7), texts(" warm", 60, 8), fpr=0.1, model=planted_model, out=tmp_path / "g.safetensors"
    )
    assert found.gate.probability is not None
    assert 0.01 < found.gate.probability < 0.99
    assert found.gate.true_positive is not None
    assert found.gate.true_positive.value > 0.9
    written = Probe.load(tmp_path / "g.safetensors")
    assert written.threshold == pytest.approx(found.gate.threshold.value)
    again = measure(written, texts(" warm", 30, 3), texts(" cold", 30, 4), model=planted_model)
    assert again.threshold == written.threshold
    assert not again.warnings
    last = measure(written, texts(" warm", 30, 3), texts(" cold", 30, 4), model=planted_model, tokens="last")
    assert "was chosen on other scores (completion, mean) than those of the test (last, mean)" in last.warnings[0]


def test_all_positives_report_but_those_whose_group_chose_the_threshold(probe: Probe) -> None:
    negatives = [Example(f"no {i}", group=f"g{i}") for i in range(60)]
    chose = [each for each, first in zip(negatives, sides(negatives, 0), strict=True) if first]
    positives = [Example(f"yes {i}") for i in range(20)] + [Example("yes", group=each.group) for each in chose[:3]]
    found = choose_threshold(
        probe, 1, 0.1, (negatives, [torch.tensor([float(i)]) for i in range(60)]),
        (positives, [torch.tensor([100.0])] * 23), tokens="last", pool="last", per_token=False, seed=0,
    )  # fmt: skip
    assert found.true_positive is not None
    assert (found.true_positive.above, found.true_positive.total) == (20, 20)
    assert found.report()["positives_left_out"] == 3


def gated(tokens: str = "prompt", per_token: bool = False, site: str = "resid_post") -> Gated:
    probe = Probe({1: Readout(torch.ones(4), 0.0)}, {"site": site})
    rate = Rate(0, 9, 0.0, 0.3)
    return Gated(Gate(1, 0.1, Threshold(1.25, 9, 0.1), rate, None, per_token, probe), tokens, "mean", ())


def test_a_condition_is_printed_only_for_the_states_that_it_reads() -> None:
    """The rate of a threshold on the answers says nothing of the last token of the prompt, where a server decides."""
    assert gated().condition("g") == "@when:g>1.25"
    assert gated().condition("my probe") == "@when:'my probe'>1.25"
    assert gated("completion", per_token=True).condition("g") == "@while:g>1.25"
    for other, step in (
        (gated("completion"), "train with --tokens prompt"), (gated("last"), "train with --tokens prompt"),
        (gated("all", per_token=True), "--tokens completion"), (gated("prompt", per_token=True), "--tokens completion"),
        (gated(site="mlp_out"), "without --site"),
    ):  # fmt: skip
        assert other.condition("g") is None
        assert step in str(other.no_condition)


def test_a_gate_can_decide_at_every_token(planted_model: Path, probe: Probe, texts: Texts) -> None:
    found = gate(probe, texts("", 60, 7), texts(" warm", 60, 8), fpr=0.05, per_token=True, model=planted_model)
    assert found.gate.false_positive.total > 200
    assert found.gate.false_positive.low <= 0.06
    assert found.condition("p").startswith("@while:p>")
    # Of the nine tokens of a text that count (eight letters and a word) one is warm.
    assert found.gate.true_positive is not None
    assert found.gate.true_positive.value > 0.1


def test_a_rate_that_so_few_texts_cannot_show_is_refused(planted_model: Path, probe: Probe, texts: Texts) -> None:
    with pytest.raises(ExampleError, match=r"too few for a false-positive rate of 0\.001"):
        gate(probe, texts("", 40, 7), fpr=0.001, model="/absent")
    for rate in (0.0, 1.0, 1.5):
        with pytest.raises(UsageError, match=f"the false-positive rate {rate:g} does not lie between 0 and 1"):
            gate(probe, texts("", 40, 7), fpr=rate, model=planted_model)


# Token by token


def test_a_text_is_projected_token_by_token(planted_model: Path, probe: Probe) -> None:
    """A word's own embedding is half the distance along the direction."""
    vector = steer.SteeringVector({1: DISTANCE * direction()}, {"base": probe.base})
    found = steer.project("ab warm cold", vector, model=planted_model)
    assert "".join(found.tokens) == "<|bos|>ab warm cold"
    values = dict(zip(found.tokens, found.values[:, 0].tolist(), strict=True))
    assert values[" warm"] == pytest.approx(0.5, abs=1e-5)
    assert values[" cold"] == pytest.approx(-0.5, abs=1e-5)
    scores = steer.project("ab warm cold", probe, model=planted_model)
    assert scores.layers == [probe.layer]
    assert scores.values[-2, 0] > 0 > scores.values[-1, 0]


def test_a_character_over_several_tokens_is_written_once(planted_model: Path, probe: Probe) -> None:
    found = steer.project("a🙂é warm", probe, model=planted_model)
    assert "".join(found.tokens) == "<|bos|>a🙂é warm"
    assert len(found.tokens) == len(found.ids) == len(found.values)


def test_a_layer_that_a_vector_lacks_or_where_it_is_zero_is_refused(planted_model: Path) -> None:
    vector = steer.SteeringVector({1: torch.zeros(pico.HIDDEN)})
    with pytest.raises(ArtifactError, match="the vector holds no layer 3"):
        steer.project("a", vector, layers=[3], model=planted_model)
    with pytest.raises(ArtifactError, match="the vector is zero at layer 1"):
        steer.project("a", vector, model=planted_model)


def test_layers_are_a_text_a_number_or_several(planted_model: Path) -> None:
    vector = steer.SteeringVector({i: torch.ones(pico.HIDDEN) for i in (0, 1, 3)}, {"apply": [1]})
    for layers, read in (("0,3", [0, 3]), ("0-1", [0, 1]), (3, [3]), ([3, 1], [3, 1]), ("all", [0, 1, 3])):
        assert steer.project("a", vector, layers=layers, model=planted_model).layers == read
    (found,) = steer.activations("a", 2, model=planted_model)
    assert list(found.sites["resid_post"]) == [2]
    for wrong in ("x", [], [1.5], -1, None):
        with pytest.raises(UsageError, match="layer"):
            steer.activations("a", wrong, model=planted_model)


def test_activations_come_with_the_text_of_each_token(planted_model: Path) -> None:
    first, second = steer.activations(["ab warm", "c"], [0, 3], model=planted_model)
    assert first.tokens == ["<|bos|>", "a", "b", " warm"]
    assert second.tokens == ["<|bos|>", "c"]
    states = first.sites["resid_post"]
    assert list(states) == [0, 3]
    assert states[0].shape == (4, pico.HIDDEN)
    torch.testing.assert_close(states[3][3], DISTANCE / 2 * direction())
    with pytest.raises(SteerError, match="there is no site 'attn'"):
        steer.activations("a", sites="attn", model=planted_model)


# The command line


def run(*arguments: str) -> int:
    from steer.cli import run as run_command

    return run_command(list(arguments))


def test_the_commands_work_one_after_another(
    planted_model: Path,
    texts: Texts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ("--model", str(planted_model))
    assert run("probe", "train", "--pos", str(texts(" warm", 20, 1)), "--neg", str(texts(" cold", 20, 2)),
               "--layers", "1-2", "-o", "p.safetensors", *model) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "20 of 20 positives above the threshold, 0 of 20 negatives" in printed
    assert "wrote p.safetensors  sha256:" in printed
    assert run("probe", "test", "p.safetensors", "--pos", str(texts(" warm", 9, 3)), "--neg", str(texts(" cold", 9, 4)),
               "--html", "t.html", "--json", *model) == 0  # fmt: skip
    tested = json.loads(capsys.readouterr().out)
    assert tested["sets"][IN]["auroc"] == 1.0
    assert "<svg" in Path("t.html").read_text()
    assert run("probe", "gate", "p.safetensors", "--neg", str(texts("", 40, 5)), "--fpr", "0.1", "--json", *model) == 0
    chosen = json.loads(capsys.readouterr().out)
    assert chosen["condition"] is None
    assert "--tokens prompt" in chosen["no_condition"]
    assert run("probe", "gate", "p.safetensors", "--neg", str(texts("", 40, 5)), "--fpr", "0.1", "--tokens", "prompt",
               *model) == 0  # fmt: skip
    assert "condition: @when:p>" in capsys.readouterr().out
    assert run("probe", "apply", "p.safetensors", "-t", "a <b> warm", "--html", "a.html", *model) == 0
    assert '" warm"' in capsys.readouterr().out
    page = Path("a.html").read_text()
    assert "&lt;" in page
    assert "<b>" not in page
    assert run("probe", "apply", "p.safetensors", "-t", "a", "--html", "a.html", *model) == 1
    assert "the output a.html exists" in capsys.readouterr().err
    assert run("probe", "apply", "p.safetensors", *model) == 2
    assert run("probe", "trian") == 2
    assert "did you mean steer probe train?" in capsys.readouterr().err
