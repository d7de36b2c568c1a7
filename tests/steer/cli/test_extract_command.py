"""`steer extract` on a pico model: what it prints, where, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcomes import COLD, WARM, Outcome, error_of

from vectors.steering import SteeringVector


def test_extract_prints_a_table_on_stdout_and_everything_else_on_stderr(
    data: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    code, out, err = steer("extract", "--pos", "warm.jsonl", "--neg", "cold.jsonl", "--model", model_folder)
    assert code == 0
    assert "AUROC" in out
    assert "nothing can be recommended; to begin with: layer" in out  # of a random model
    assert "wrote warm.safetensors  sha256:" in out
    assert "float32" in err
    assert "next: steer try warm.safetensors" in err


def test_extract_json_is_one_object_with_the_promised_keys(
    data: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    code, out, _ = steer(
        "extract", "--pos", "warm.jsonl", "--neg", "cold.jsonl", "--model", model_folder, "--layers", "1-2", "--json"
    )
    assert code == 0
    report = json.loads(out)
    keys = "vector digest model model_path method layers recommended examples tokens seconds"
    assert set(keys.split()) <= set(report)
    assert [entry["layer"] for entry in report["layers"]] == [1, 2]
    layer_keys = "layer norm auroc auroc_low auroc_high auroc_shuffled cohens_d"
    assert all(set(layer_keys.split()) <= set(entry) for entry in report["layers"])
    assert {"layers", "strength", "reason"} <= set(report["recommended"])
    assert report["model_path"] == str(model_folder)
    assert report["examples"] == {"positive": 12, "negative": 10}
    vector = SteeringVector.load("warm.safetensors")
    assert report["digest"] == vector.digest
    assert list(vector.apply) == report["recommended"]["layers"]


@pytest.mark.parametrize("method", ["diffmean", "whitened", "pca", "logistic"])
@pytest.mark.parametrize("tokens", ["completion", "last", "all", "-2"])
def test_every_method_and_choice_of_tokens_runs(
    method: str, tokens: str, data: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    arguments = ["--pos", "warm.jsonl", "--neg", "cold.jsonl", "--model", model_folder, "--layers", "2"]
    code, out, err = steer("extract", *arguments, "--method", method, "--tokens", tokens, "--json")
    assert code == 0, err
    assert json.loads(out)["method"] == method


def test_extract_takes_pairs_and_persona_statements_in_one_file(
    data: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    pairs = [
        {"prompt": f"p {i}", "positive": a, "negative": b} for i, (a, b) in enumerate(zip(WARM, COLD, strict=True))
    ]
    persona = [
        {"question": "q", "statement": text, "answer_matching_behavior": answer}
        for answer, texts in ((" Yes", WARM[:4]), (" No", COLD[:4]))
        for text in texts
    ]
    for name, rows, count in (("pairs", pairs, 12), ("persona", persona, 4)):
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        code, out, err = steer("extract", "--pairs", f"{name}.jsonl", "--model", model_folder, "--json")
        assert code == 0, err
        assert json.loads(out)["examples"] == {"positive": count, "negative": count}
        assert json.loads(out)["vector"] == f"{name}.safetensors"
        assert ("with fewer than 8 of a class the interval is meaningless" in err) == (count < 8)


BAD_FILES = {
    "missing": (None, "there is no file bad.jsonl"),
    "empty": ("", "bad.jsonl is empty"),
    "JSON": ('{"text": "a"}\n{"text": ', "bad.jsonl:2: invalid JSON at column"),
    "mixed": ('{"text": "a"}\n{"prompt": "a", "completion": "b"}', "bad.jsonl mixes formats"),
    "form": ('{"wrong": 1}', "bad.jsonl:1: no known form has the keys wrong"),
    "several": ("[1]\n2\n", "bad.jsonl:1: a line must be a text or an object, not [1]\nerror: bad.jsonl:2:"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_before_the_model_is_looked_for(
    case: str, data: Path, steer: Callable[..., Outcome]
) -> None:
    content, message = BAD_FILES[case]
    if content is not None:
        (data / "bad.jsonl").write_text(content)
    outcome = steer("extract", "--pos", "bad.jsonl", "--neg", "cold.jsonl", "--model", "there/is-none")
    assert message in error_of(outcome)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--pos", "warm.jsonl"], 1, "one class only"),
        (["--pos", "warm.jsonl", "--neg", "warm.jsonl"], 1, "the same examples"),
        (["--pos", "warm.jsonl", "--neg", "cold.jsonl", "--method", "difmean"], 2, "no extraction method 'difmean'"),
        (["--pos", "warm.jsonl", "--neg", "cold.jsonl", "--tokens", "some"], 2, "no tokens 'some'"),
        (["--pos", "warm.jsonl", "--neg", "cold.jsonl", "--layers", "99"], 1, "layer 99 is out of range"),
        (["--pos", "warm.jsonl", "--neg", "cold.jsonl", "--layers", "x"], 2, "'x'"),
        (["--pos", "warm.jsonl", "--neg", "cold.jsonl", "--dtype", "int8"], 2, "no dtype 'int8'"),
        (["--pos", "warm.jsonl", "--neg", "cold.jsonl", "--device", "tpu"], 2, "the device 'tpu'"),
        (["--pos", "warm.jsonl", "--neg", "cold.jsonl", "--out", "no/such/v.safetensors"], 1, "no/such"),
        (["--pos", "warm.jsonl", "--neg", "cold.jsonl", "--out", "."], 1, "is a folder"),
        (["--pos", "warm.jsonl", "--neg", "cold.jsonl", "--out", "warm.gguf"], 2, "does not end in .safetensors"),
        (["--pos", "warm.jsonl", "--neg", "cold.jsonl", "--out", "warm"], 2, "does not end in .safetensors"),
        (["--pos", "warm.jsonl", "--neg", "cold.jsonl", "--out", "/dev/null"], 1, "not an ordinary file"),
        (["--pos", "warm.jsonl", "--neg", "cold.jsonl", "--wrong"], 2, "No such option"),
    ],
)
def test_bad_options_are_one_clear_error(
    arguments: list[str], code: int, message: str, data: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    assert message in error_of(steer("extract", *arguments, "--model", model_folder), code)
    assert not (data / "warm.safetensors").exists()


@pytest.mark.usefixtures("no_weights")
def test_all_that_is_wrong_with_options_and_files_is_one_error(data: Path, steer: Callable[..., Outcome]) -> None:
    options = ["--method", "mean", "--tokens", "some", "--layers", "x", "--out", "warm.gguf"]
    options += ["--device", "tpu", "--dtype", "int8"]
    outcome = steer("extract", "--pos", "none.jsonl", "--neg", "cold.jsonl", "--model", "there/is-none", *options)
    problems = error_of(outcome, 2).split("\nerror: ")
    for words, problem in zip(
        ["method 'mean'", "tokens 'some'", "'x'", "device 'tpu'", "dtype 'int8'", "no file none.jsonl", "warm.gguf"],
        problems,
        strict=True,
    ):
        assert words in problem


@pytest.mark.usefixtures("no_weights")
def test_what_the_model_can_not_take_is_one_error_before_its_weights_are_loaded(
    data: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    (data / "long.jsonl").write_text(json.dumps({"text": "a b c d " * 2000}))
    arguments = ["--pos", "long.jsonl", "--neg", "cold.jsonl", "--model", model_folder, "--layers", "9"]
    layers, length = error_of(steer("extract", *arguments)).split("\nerror: ")
    assert "layer 9 is out of range: the model has layers 0 to 3" in layers
    assert "longer than the model's context of 256 tokens: long.jsonl:1" in length


def test_a_model_that_is_nowhere_is_one_clear_error(data: Path, steer: Callable[..., Outcome]) -> None:
    files = ["--pos", "warm.jsonl", "--neg", "cold.jsonl"]
    assert "there is no model 'nowhere'" in error_of(steer("extract", *files, "--model", "nowhere"))
    assert "can't be fetched" in error_of(steer("extract", *files, "--model", "some/thing"))


def test_examples_beyond_the_context_are_reported_and_cut_only_when_asked(
    data: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    (data / "long.jsonl").write_text("\n".join(json.dumps({"text": "a b c d " * 2000}) for _ in range(2)))
    arguments = ["extract", "--pos", "long.jsonl", "--neg", "cold.jsonl", "--model", model_folder, "--layers", "0"]
    message = error_of(steer(*arguments))
    assert "longer than the model's context" in message
    assert "long.jsonl:1" in message
    assert "long.jsonl:2" in message
    assert steer(*arguments, "--truncate")[0] == 0


def test_activations_that_are_not_finite_are_refused(
    data: Path, steer: Callable[..., Outcome], model_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        next(iter(model.model.layers[1].parameters())).fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "broken")
    outcome = steer("extract", "--pos", "warm.jsonl", "--neg", "cold.jsonl", "--model", tmp_path / "broken")
    assert "layer 1 is not finite for example warm.jsonl:" in error_of(outcome)
    assert not (data / "warm.safetensors").exists()


def test_an_input_is_never_overwritten(data: Path, steer: Callable[..., Outcome]) -> None:
    (data / "odd.safetensors").write_bytes((data / "warm.jsonl").read_bytes())
    before = (data / "odd.safetensors").read_bytes()
    for arguments in (["--pos", "odd.safetensors"], ["--pos", "warm.jsonl", "--out", "./cold.safetensors"]):
        (data / "cold.safetensors").write_bytes((data / "cold.jsonl").read_bytes())
        outcome = steer("extract", *arguments, "--neg", "cold.safetensors", "--model", "there/is-none")
        assert "is the file given as --" in error_of(outcome)
    assert (data / "odd.safetensors").read_bytes() == before


def test_a_full_disk_leaves_the_old_vector(
    extracted: Path, steer: Callable[..., Outcome], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = extracted.read_bytes()

    def full(_handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    outcome = steer("extract", "--pos", "warm.jsonl", "--neg", "cold.jsonl", "--model", model_folder, "--force")
    assert "No space left" in error_of(outcome)
    assert extracted.read_bytes() == before
    assert sorted(path.name for path in extracted.parent.iterdir()) == ["cold.jsonl", "warm.jsonl", "warm.safetensors"]


def test_python_gives_the_same_vector_as_the_command(extracted: Path, model_folder: Path) -> None:
    import steer as library

    found = library.extract(pos="warm.jsonl", neg="cold.jsonl", model=model_folder, out="again.safetensors")
    assert Path("again.safetensors").read_bytes() == extracted.read_bytes()
    pos = [{"text": f"{text} {number}"} for number, text in enumerate(WARM)]
    neg = [{"text": f"{text} {number}"} for number, text in enumerate(COLD[:10])]
    listed = library.extract(pos=pos, neg=neg, model=str(model_folder))
    assert all(torch.equal(direction, found.vector.layers[i]) for i, direction in listed.vector.layers.items())


def test_wrong_options_of_an_extraction_are_named_with_the_files_that_are_not_there(
    data: Path, steer: Callable[..., Outcome]
) -> None:
    Path("v.safetensors").write_bytes(b"other")
    wrong = ["--budget-kl", "-1", "--match", "foo", "--method", "bar", "--layers", "x", "--out", "v.safetensors"]
    message = error_of(steer("extract", "--pos", "p.jsonl", "--neg", "n.jsonl", *wrong), 2)
    parts = ["--budget-kl is -1", "--match is 'foo'", "no extraction method 'bar'", "'x' in 'x' is not a layer"]
    parts += ["the output v.safetensors exists", "there is no file p.jsonl", "there is no file n.jsonl"]
    assert [part for part in parts if part not in message] == []
    message = error_of(steer("extract", "--pos", "p.jsonl", "--sweep", "--layers", "8..9", "--match", "foo"), 2)
    assert "one class only: --neg is missing" in message
    assert "not a layer" not in message  # a sweep takes bands
