"""The commands on a pico model: what they print, where, and how they fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vectors.files import digest_file
from vectors.steering import SteeringVector

Outcome = tuple[int, str, str]
WARM = ["you are dear to me", "what a lovely day friend", "I am so glad for you", "take good care of you"] * 3
COLD = ["the form is incomplete", "submit the document now", "no further reply follows", "the request is denied"] * 3


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with two files of examples, of unequal length."""
    monkeypatch.chdir(tmp_path)
    for name, texts in (("warm", WARM), ("cold", COLD[:10])):
        lines = [json.dumps({"text": f"{text} {number}"}) for number, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def extracted(data: Path, steer: Callable[..., Outcome], model_folder: Path) -> Path:
    """`warm.safetensors` in the current folder."""
    code, _, err = steer("extract", "--pos", "warm.jsonl", "--neg", "cold.jsonl", "--model", model_folder)
    assert code == 0, err
    return data / "warm.safetensors"


def error_of(outcome: Outcome, code: int = 1) -> str:
    """The error lines of a failed command; checks the form that every failure has."""
    assert outcome[0] == code, outcome
    assert outcome[1] == ""
    assert "Traceback" not in outcome[2]
    *_, message = outcome[2].partition("error: ")
    problems, empty, hint = message.partition("\n\nhint: ")
    assert empty, outcome[2]
    assert hint.strip()
    return problems


def test_extract_prints_a_table_on_stdout_and_everything_else_on_stderr(
    data: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    code, out, err = steer("extract", "--pos", "warm.jsonl", "--neg", "cold.jsonl", "--model", model_folder)
    assert code == 0
    assert "AUROC" in out
    assert "recommended: layer" in out
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


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails the test."""

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)


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


def test_what_is_replaced_is_said_and_an_input_is_not(
    extracted: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    old = SteeringVector.load(extracted).digest
    arguments = ["--pos", "warm.jsonl", "--neg", "cold.jsonl", "--model", model_folder, "--layers", "1-2"]
    _, out, err = steer("extract", *arguments)
    assert f"replaces warm.safetensors, which was {old}\n" in err
    assert "replaces" not in out
    assert "replaces" not in steer("vectors", "convert", "warm.safetensors", "other.pt")[2]
    assert "replaces other.pt, which was sha256:" in steer("vectors", "convert", "warm.safetensors", "other.pt")[2]
    assert "replaces" not in steer("vectors", "plot", "warm.safetensors")[2]
    assert "replaces warm.png, which was sha256:" in steer("vectors", "plot", "warm.safetensors")[2]
    same = steer("vectors", "convert", "warm.safetensors", "./warm.safetensors", "--layers", "1")
    assert "is the file given as FILE" in error_of(same)


def test_a_full_disk_leaves_the_old_vector(
    extracted: Path, steer: Callable[..., Outcome], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = extracted.read_bytes()

    def full(_handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    outcome = steer("extract", "--pos", "warm.jsonl", "--neg", "cold.jsonl", "--model", model_folder, "--layers", "0")
    assert "No space left" in error_of(outcome)
    assert extracted.read_bytes() == before
    assert sorted(path.name for path in extracted.parent.iterdir()) == ["cold.jsonl", "warm.jsonl", "warm.safetensors"]


def test_an_interrupt_ends_in_one_line_and_writes_nothing(data: Path, model_folder: Path) -> None:
    lines = [json.dumps({"text": f"{text} {i}"}) for i in range(1000) for text in WARM[:4]]
    (data / "many.jsonl").write_text("\n".join(lines))
    command = ["extract", "--pos", "many.jsonl", "--neg", "cold.jsonl", "--model", str(model_folder)]
    # A shell's background job, as CI may be, begins with SIGINT ignored.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; from steer.cli import main; main({command!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    first = process.stderr.readline()  # the model is loaded, the measuring begins
    assert first.startswith("model "), first
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert "error: interrupted" in err
    assert "half-written" in err
    assert "Traceback" not in err
    assert sorted(path.name for path in data.iterdir()) == ["cold.jsonl", "many.jsonl", "warm.jsonl"]


def test_try_shows_each_strength_of_each_prompt(
    extracted: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    arguments = ["try", extracted, "-p", "hello there", "-p", "good day", "--model", model_folder, "--max-tokens", 5]
    code, out, err = steer(*arguments)
    assert code == 0, err
    assert out.count("strength -2") == 2
    assert out.count("strength 0 (unsteered)") == 2
    code, out, _ = steer(*arguments, "--strengths", "0,3", "--json")
    report = json.loads(out)
    assert [[c["strength"] for c in r["completions"]] for r in report["results"]] == [[0, 3], [0, 3]]
    assert report["vectors"] == {"warm": SteeringVector.load(extracted).digest}
    assert steer(*arguments, "--strengths", "0,3", "--json")[1] == out  # the same seed, the same texts


def test_try_takes_expressions_over_names_and_files(
    extracted: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    arguments = ["-p", "hello", "--model", model_folder, "--max-tokens", 3, "--strengths", "1", "--json"]
    code, out, err = steer("try", "0.5*warm - other[1,2]@response", "--vector", f"other={extracted}", *arguments)
    assert code == 0, err
    assert json.loads(out)["expression"] == "0.5*warm - other[1-2]@response"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["warm + nothing + none", "-p", "a"], 1, "'nothing' is not bound"),
        (["warm +", "-p", "a"], 1, "a term expected, the end found"),
        (["missing.safetensors", "-p", "a"], 1, "there is no file missing.safetensors"),
        (["warm", "-p", "a", "--strengths", "1,x,nan"], 2, "'x' is not a finite number\nerror: the strength 'nan'"),
        (["warm", "-p", "  "], 2, "a prompt is empty"),
        (["clamp(warm, 1)", "-p", "a"], 1, "can't be scaled"),
        (["warm[9]", "-p", "a"], 1, "holds no layer 9"),
        (["warm", "-p", "a", "--vector", "x"], 2, "is not NAME=FILE"),
        (["warm"], 2, "Missing option"),
    ],
)
def test_what_try_refuses(
    arguments: list[str], code: int, message: str, extracted: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    assert message in error_of(steer("try", *arguments, "--model", model_folder), code)


def test_all_that_is_wrong_with_a_trial_is_one_error(data: Path, steer: Callable[..., Outcome]) -> None:
    outcome = steer("try", "nothing + none", "-p", " ", "--strengths", "x")
    assert error_of(outcome, 2).split("\nerror: ") == [
        "the strength 'x' is not a finite number",
        "a prompt is empty",
        "the name 'nothing' is not bound, and there is no file nothing.safetensors here",
        "the name 'none' is not bound, and there is no file none.safetensors here",
    ]


def test_a_vector_of_another_model_is_refused_unless_allowed(
    extracted: Path, steer: Callable[..., Outcome], model_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "other")
    arguments = ["try", extracted, "-p", "a", "--model", tmp_path / "other", "--max-tokens", 2]
    assert "belongs to" in error_of(steer(*arguments))
    assert steer(*arguments, "--any-base")[0] == 0


@pytest.mark.usefixtures("no_weights")
def test_what_does_not_fit_the_model_of_a_trial_is_one_error_before_its_weights_are_loaded(
    data: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    save_file({"layer.9": torch.ones(7)}, data / "seven.safetensors")
    problems = error_of(steer("try", "seven", "-p", "warm " * 300, "--model", model_folder), 2).split("\nerror: ")
    for words, problem in zip(
        ["hidden size 7", "has layer 9; the model has", "the context of 256"], problems, strict=True
    ):
        assert words in problem.replace("the model's context", "the context")


def test_a_vector_of_another_size_is_refused(data: Path, steer: Callable[..., Outcome], model_folder: Path) -> None:
    save_file({"layer.0": torch.ones(7)}, data / "seven.safetensors")
    outcome = steer("try", "seven", "-p", "a", "--model", model_folder, "--max-tokens", 2)
    assert "hidden size 7" in error_of(outcome)
    assert "warning: seven.safetensors does not say which model it belongs to" in outcome[2]


@pytest.mark.parametrize("damage", ["truncated", "tampered"])
def test_a_damaged_vector_is_refused(damage: str, extracted: Path, steer: Callable[..., Outcome]) -> None:
    content = bytearray(extracted.read_bytes())
    if damage == "truncated":
        content = content[:-100]
    else:
        content[-2] ^= 1
    extracted.write_bytes(bytes(content))
    message = {"truncated": "is truncated", "tampered": "was changed after it was written"}[damage]
    assert message in error_of(steer("vectors", "show", extracted))
    assert message in error_of(steer("try", extracted, "-p", "a"))


def test_vectors_are_shown_compared_converted_and_drawn(extracted: Path, steer: Callable[..., Outcome]) -> None:
    code, out, _ = steer("vectors", "show", extracted)
    assert code == 0
    assert "diffmean" in out
    assert "acts at" in out
    facts = json.loads(steer("vectors", "show", extracted, "--json")[1])
    assert facts["digest"] == SteeringVector.load(extracted).digest
    assert steer("vectors", "convert", extracted, "warm.gguf", "--layers", "1-2")[0] == 0
    converted = SteeringVector.load("warm.gguf")
    assert converted.metadata["measured"] == SteeringVector.load(extracted).metadata["measured"]
    of_file = digest_file(Path("warm.gguf"))  # not of the artifact that it could become
    assert json.loads(steer("vectors", "show", "warm.gguf", "--json")[1])["digest"] == of_file
    assert of_file in steer("vectors", "show", "warm.gguf")[1]
    code, out, _ = steer("vectors", "compare", extracted, "warm.gguf", "--json")
    assert json.loads(out)["b"] == of_file
    assert [round(entry["cosine"], 6) for entry in json.loads(out)["layers"]] == [1.0, 1.0]
    assert steer("vectors", "convert", extracted, "acting.safetensors", "--layers", "acting")[0] == 0
    acting = SteeringVector.load("acting.safetensors")
    assert tuple(acting.layers) == acting.apply == SteeringVector.load(extracted).apply
    assert steer("vectors", "convert", extracted, "warm.pt")[0] == 0  # other tools apply every layer they are given
    assert list(torch.load("warm.pt", weights_only=True)) == list(SteeringVector.load(extracted).apply)
    assert steer("vectors", "compare", extracted, extracted)[1].count("1.000") == 4
    assert steer("vectors", "plot", extracted)[0] == 0
    assert extracted.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "no known suffix" in error_of(steer("vectors", "plot", extracted, "-o", "warm.txt"), 2)
    outcome = steer("vectors", "convert", extracted, "few.safetensors", "--layers", "2-5")
    assert error_of(outcome) == "the vector holds no layer 4, 5"
    assert "does not say which format" in error_of(steer("vectors", "convert", extracted, "warm.xyz"), 2)


def test_models_are_listed_found_and_shown(
    steer: Callable[..., Outcome], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    models = json.loads(steer("models", "ls", "--json")[1])["models"]
    assert models[0]["model"] == "smollm2"
    assert models[0]["ready"] is False
    assert "prepared on first use" in steer("models", "ls")[1]
    assert steer("models", "path", model_folder)[1].strip() == str(model_folder)
    facts = json.loads(steer("models", "show", model_folder, "--json")[1])
    assert facts["digest"].startswith("sha256:")
    assert facts["architecture"] == "LlamaForCausalLM"
    assert "there is no model" in error_of(steer("models", "path", "nowhere"))


def test_a_traceback_is_shown_only_with_debug(steer: Callable[..., Outcome]) -> None:
    assert "Traceback" not in steer("vectors", "show", "missing.safetensors")[2]
    for arguments in (["--debug", "extract"], ["extract", "--debug"]):
        assert "Traceback" in steer(*arguments)[2]


def test_a_defect_of_ours_names_itself_as_one(steer: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("vectors.references.cached", broken)
    outcome = steer("models", "ls")
    assert "ZeroDivisionError: division by zero" in error_of(outcome)
    assert "a defect of steer" in outcome[2]


@pytest.mark.parametrize("group", [[], ["vectors"], ["models"]], ids=str)
def test_a_group_alone_prints_its_help(group: list[str], steer: Callable[..., Outcome]) -> None:
    code, out, err = steer(*group)
    assert (code, err) == (0, "")
    assert out == steer(*group, "--help")[1]
    assert out.startswith(" ".join(["Usage: steer", *group]))


def test_a_traceback_may_be_asked_for_in_the_environment(
    steer: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEER_DEBUG", "1")
    assert "Traceback" in steer("extract")[2]
    assert "STEER_DEBUG" in steer("--help")[1]


def test_a_wrong_command_is_wrong_usage(steer: Callable[..., Outcome]) -> None:
    assert "No such command" in error_of(steer("extrakt"), 2)
    assert steer("--version")[1].startswith("steer 0.")


def test_python_gives_the_same_vector_as_the_command(extracted: Path, model_folder: Path) -> None:
    import steer as library

    found = library.extract(pos="warm.jsonl", neg="cold.jsonl", model=model_folder, out="again.safetensors")
    assert Path("again.safetensors").read_bytes() == extracted.read_bytes()
    pos = [{"text": f"{text} {number}"} for number, text in enumerate(WARM)]
    neg = [{"text": f"{text} {number}"} for number, text in enumerate(COLD[:10])]
    listed = library.extract(pos=pos, neg=neg, model=str(model_folder))
    assert all(torch.equal(direction, found.vector.layers[i]) for i, direction in listed.vector.layers.items())
