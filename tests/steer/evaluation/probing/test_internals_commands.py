"""`steer probe saturation`, `state` and `attribute` on model folders."""

from __future__ import annotations

import json
from pathlib import Path

import pico
import pytest
import torch
from planted_texts import DISTANCE, direction, lines

import steer
from steer.cli import run
from steer.evaluation.probing import opening
from vectors.errors import UsageError
from vectors.probe import Probe
from vectors.steering import SteeringVector


def changed(folder: Path, name: str, part: str) -> Path:
    """A pico model in which the weights whose name holds `part` are zero."""
    model = pico.build(name)
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            if part in each:
                parameter.zero_()
    model.save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)
    return folder


def test_saturation_before_and_after_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = pico.save(tmp_path / "before")
    after = changed(tmp_path / "after", "llama", "layers.3.self_attn.q_proj")
    arguments = ["probe", "saturation", str(before), "--against", str(after), "-t", "some text", "-t", "another one"]
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    assert "on 2 texts:" in printed
    assert "there are only 2 texts; a verdict takes at least 30; the heads whose entropy changed most:" in printed
    assert run([*arguments[:-2], "--texts", str(lines(tmp_path / "texts.jsonl", " warm", 30, 1))]) == 0
    assert (
        "of 16 heads changed their entropy (p below 0.05, corrected for the number of heads)" in capsys.readouterr().out
    )
    assert run(arguments[:-2]) == 0
    printed = capsys.readouterr().out
    assert "on 1 text:" in printed
    assert "95 % interval" not in printed
    assert run([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["heads"]) == 16
    assert all(each["entropy"] == 1.0 for each in report["against"] if each["layer"] == 3)
    assert {each["layer"] for each in report["changes"]["entropy"][:4]} == {3}
    other = pico.save(tmp_path / "other", num_hidden_layers=2)
    assert run(["probe", "saturation", str(before), "--against", str(other), "-t", "some text"]) == 1
    assert "different layers or heads" in capsys.readouterr().err


def test_the_state_of_a_model_that_did_not_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pico.save(tmp_path / "lfm2", "lfm2")
    SteeringVector({0: torch.ones(pico.HIDDEN)}).save(tmp_path / "v.safetensors")
    arguments = ["probe", "state", str(folder), str(folder), "--vector", str(tmp_path / "v.safetensors"), "-p", "Hi"]
    assert run(arguments) == 1
    assert "give two contexts or more" in capsys.readouterr().err
    assert run([*arguments, "-p", "How are you?", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(each["layer"], each["kind"], each["movement"]) for each in report["states"]] == [(2, "convolution", 0.0)]
    assert run([*arguments, "-p", "How are you?"]) == 0
    printed = capsys.readouterr().out
    assert "+0.000 to +0.000" in printed
    assert "No movement is marked: there are only 2 contexts; a verdict takes at least 30." in printed


@pytest.mark.slow
def test_blocks_that_add_nothing_carry_nothing_of_an_effect(
    planted_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformer_lens", reason="the extra `lens` is not installed")
    SteeringVector({1: DISTANCE * direction()}).save(tmp_path / "v.safetensors")
    arguments = ["probe", "attribute", str(tmp_path / "v.safetensors"), "-t", "ab warm", "--model", str(planted_model)]
    assert run([*arguments, "--strength", "0.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["total"] == pytest.approx(DISTANCE / 2)
    first, *others = report["components"]
    assert (first["name"], first["contribution"]) == ("vector 1", pytest.approx(DISTANCE / 2))
    assert all(each["contribution"] == 0 for each in others)


def test_attribution_without_transformer_lens_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "transformer_lens" else find(name)
    )
    SteeringVector({1: torch.ones(4)}).save(tmp_path / "v.safetensors")
    assert run(["probe", "attribute", str(tmp_path / "v.safetensors"), "-t", "a"]) == 2
    assert "pip install 'steer-workbench[lens]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_probe_of_another_site_is_trained_tested_and_applied_there(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformer_lens", reason="the extra `lens` is not installed")
    monkeypatch.chdir(tmp_path)
    files = [lines(tmp_path / f"{n}.jsonl", word, 16, n) for n, word in enumerate((" warm", " cold") * 2)]
    model = ("--model", str(model_folder))
    train = ["probe", "train", "--pos", str(files[0]), "--neg", str(files[1]), "--site", "mlp_out", "--layers", "1,2"]
    train += ["--tokens", "last"]
    assert run([*train, "-o", "p.safetensors", *model]) == 0
    assert Probe.load("p.safetensors").site == "mlp_out"
    capsys.readouterr()
    assert (
        run(["probe", "test", "p.safetensors", "--pos", str(files[2]), "--neg", str(files[3]), "--json", *model]) == 0
    )
    assert json.loads(capsys.readouterr().out)["sets"]["in distribution"]["auroc"] > 0.8
    loaded = steer.load_model(model_folder)
    (found,) = steer.activations("ab warm", [1], ["mlp_out", "head"], model=loaded)
    assert found.sites["head"][1].shape == (4, pico.HIDDEN)
    probe = Probe.load("p.safetensors")
    scores = steer.project("ab warm", probe, layers=[1], model=loaded).values[:, 0]
    torch.testing.assert_close(scores, probe.at(1).scores(found.sites["mlp_out"][1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["state", "./nope", "./nope2", "--vector", "no.safetensors", "--strength", "nan", "--prompts", "no.txt",
             "--device", "abacus"],
            ["--strength is nan", "no.txt", "no.safetensors", "'./nope'", "'./nope2'", "abacus"],
        ),
        (
            ["saturation", "./nope", "--against", "./nope2", "--texts", "no.jsonl", "-t", " ", "--dtype", "int3"],
            ["no.jsonl", "--text 1 is empty", "'./nope'", "'./nope2'", "int3"],
        ),
        (
            ["apply", "no.safetensors", "v.safetensors", "--texts", "no.jsonl", "--html", "x.txt", "--layers", "99",
             "--model", "./nope"],
            ["no.safetensors", "no.jsonl", "x.txt", "holds no layer 99", "'./nope'"],
        ),
        (
            ["attribute", "no.safetensors", "--probe", "p.safetensors", "-t", "", "--tokens", "many",
             "--model", "./nope"],
            ["no.safetensors", "p.safetensors", "--text 1 is empty", "many", "'./nope'"],
        ),
        (
            ["gate", "p.safetensors", "--neg", "no.jsonl", "--fpr", "2", "-o", "v.safetensors", "--model", "./nope"],
            ["p.safetensors", "no.jsonl", "rate 2", "v.safetensors exists", "'./nope'"],
        ),
        (
            ["test", "p.safetensors", "--pos", "no.jsonl", "--neg", "no2.jsonl", "--html", "x.txt",
             "--model", "./nope"],
            ["p.safetensors", "no.jsonl", "no2.jsonl", "x.txt", "'./nope'"],
        ),
        (
            ["train", "--pos", "no.jsonl", "--neg", "no2.jsonl", "-o", "v.safetensors", "--method", "svm",
             "--model", "./nope"],
            ["no.jsonl", "no2.jsonl", "v.safetensors exists", "svm", "'./nope'"],
        ),
    ],
)  # fmt: skip
def test_everything_wrong_with_a_command_is_said_at_once(
    arguments: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    SteeringVector({1: torch.ones(4)}).save("v.safetensors")
    assert run(["probe", *arguments]) != 0
    printed = capsys.readouterr().err
    assert [part for part in parts if part not in printed] == []


def test_models_that_cannot_be_compared_are_refused_before_one_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(opening, "loaded", lambda *_: pytest.fail("a model was loaded"))
    lfm2, next_, llama = (str(pico.save(tmp_path / name, name)) for name in ("lfm2", "qwen3-next", "llama"))
    vectors = {layer: str(tmp_path / f"{layer}.safetensors") for layer in (0, 3)}
    for layer, file in vectors.items():
        SteeringVector({layer: torch.ones(pico.HIDDEN)}).save(file)
    state = ["probe", "state", "-p", "a", "-p", "b", "--vector"]
    for arguments, problem in (
        ([*state, vectors[0], lfm2, next_], "states of different shapes"),
        ([*state, vectors[0], llama, llama], "no recurrent layers"),
        ([*state, vectors[3], lfm2, lfm2], "reaches no recurrent state"),
        (["probe", "saturation", llama, "--against", str(pico.save(tmp_path / "l", num_hidden_layers=2))],
         "different layers or heads"),
    ):  # fmt: skip
        assert run(arguments) == 1
        assert problem in capsys.readouterr().err


def test_a_hub_model_is_not_fetched_while_something_else_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(opening, "open_model", lambda *_: pytest.fail("the model was opened"))
    assert run(["probe", "saturation", "org/absent", "--texts", "/no.jsonl"]) == 1
    assert "no.jsonl" in capsys.readouterr().err


def test_a_message_names_the_file_and_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = pico.save(tmp_path / "lfm2", "lfm2"), tmp_path / "v.safetensors"
    vector = SteeringVector({0: torch.ones(pico.HIDDEN)}, {"base": {"digest": "sha256:" + "0" * 64}})
    vector.save(file)
    arguments = ["probe", "state", str(folder), str(folder), "-p", "a", "-p", "b", "--vector", str(file)]
    assert run(arguments) == 1
    assert f"the vector {file} belongs to sha256:{'0' * 64}, not to {folder}" in capsys.readouterr().err
    with pytest.raises(UsageError, match=rf"the vector {file} records no model"):
        steer.project("a", file)
    with pytest.raises(UsageError, match="the vector that was given records no model"):
        steer.project("a", vector)
