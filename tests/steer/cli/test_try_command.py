"""`steer try` on a pico model: what it prints and refuses."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcomes import Outcome, error_of
from safetensors.torch import save_file

from vectors.steering import SteeringVector


def test_try_shows_each_strength_of_each_prompt(
    extracted: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    arguments = ["try", extracted, "-p", "hello there", "-p", "good day", "--model", model_folder, "--max-tokens", 5]
    code, out, err = steer(*arguments)
    assert code == 0, err
    assert out.count("strength 0 (unsteered)") == 2
    whole = SteeringVector.load(extracted).metadata["recommended"]["strength"]
    assert out.count(f"strength +{whole:g}") == out.count(f"strength +{whole / 2:g}") == 2
    assert out.count("tokens, ") == 6
    code, out, err = steer("try", "2*warm", *arguments[2:])
    assert [title in out for title in ("strength +0.5", "strength +1")] == [True, True], err
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


def test_try_says_what_the_conditions_of_an_expression_read_and_decided(
    extracted: Path, steer: Callable[..., Outcome], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")  # so that no line is broken
    expression = "warm[2]@when:warm[0]>-1e9 + warm[3]@first:3@while:warm[1]>1e9"
    arguments = ["try", expression, "-p", "hello", "--model", model_folder, "--max-tokens", 5, "--strengths", "0,1"]
    code, out, err = steer(*arguments)
    assert code == 0, err
    assert out.count("@when:warm[0]>-1000000000: ") == out.count(", holds]") == 2
    assert out.count("holds on 0 of 3 tokens]") == 2  # those of the scope
    report = json.loads(steer(*arguments, "--json")[1])
    assert list(report["probes"]) == ["warm"]
    decisions = report["results"][0]["completions"][1]["decisions"]
    assert [(each["held"], each["read"]) for each in decisions] == [(1, 1), (0, 3)]
    arguments[1] = "warm@thinking"
    code, _, err = steer(*arguments)
    assert (code, "--steer-markers thinking=BEGIN,END" in err) == (2, True)
    report = json.loads(steer(*arguments, "--steer-markers", "thinking=hello,day", "--json")[1])
    (decided,) = report["results"][0]["completions"][1]["decisions"]
    assert (decided["held"], decided["read"]) == (4, 4)  # the prompt begins thinking, and nothing ends it


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
        (["warm@when:other>0", "-p", "a"], 1, "'other' is not bound"),
        (["warm@when:warm[3]>0", "-p", "a"], 1, "what is read must lie below"),
        (["warm", "-p", "a", "--vector", "x"], 2, "is not NAME=FILE"),
        (["warm", "-p", "a", "--steer-markers", "mood=a,b"], 2, "'mood=a,b' is not thinking or tools"),
        (["warm"], 2, "there is no prompt"),
        (["warm", "--prompts", "none.jsonl"], 1, "there is no file none.jsonl"),
        (["warm", "-p", "a", "-o", "warm.safetensors"], 1, "the output warm.safetensors exists"),
        (["--strengths", "1", "-p", "a"], 2, "--strengths scale a vector, and none is given"),
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
    assert f"not to {tmp_path / 'other'}" in error_of(steer(*arguments))
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


def test_a_system_prompt_is_a_column_of_the_unsteered_model(
    extracted: Path, steer: Callable[..., Outcome], model_folder: Path
) -> None:
    common = ("-p", "hello", "--model", model_folder, "--max-tokens", 4, "--temperature", 0, "--json")
    code, out, err = steer("try", "warm", "--strengths", "0,3", "--system", "Be warm.", "--system", "the cold", *common)
    assert code == 0, err
    columns = json.loads(out)["results"][0]["completions"]
    assert [(c["strength"], c["system"]) for c in columns] == [(0, None), (3, None), (0, "Be warm."), (0, "the cold")]
    turns = "<|im_start|>system\nBe warm.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    rendered = steer("try", "--model", model_folder, "-p", turns, *common[4:])
    assert json.loads(rendered[1])["results"][0]["completions"][0]["text"] == columns[2]["text"]


def test_each_text_has_its_figures(extracted: Path, steer: Callable[..., Outcome], model_folder: Path) -> None:
    import math

    import torch as t
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = ("-p", "hello", "--model", model_folder, "--max-tokens", 6, "--temperature", 0, "--strengths", "0")
    code, out, err = steer("try", "warm", *arguments, "--json", "-o", "tried.json")
    assert code == 0, err
    (found,) = json.loads(out)["results"][0]["completions"]
    assert json.loads(Path("tried.json").read_text()) == json.loads(out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    turns = [{"role": "user", "content": "hello"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with t.no_grad():
        whole = model.generate(prompt, attention_mask=t.ones_like(prompt), max_new_tokens=6, do_sample=False)
        logs = model(whole).logits[0, prompt.shape[1] - 1 : -1].double().log_softmax(-1)
    made = whole[0, prompt.shape[1] :]
    assert found["tokens"] == len(made)
    assert found["finish"] == ("stop" if int(made[-1]) == tokenizer.eos_token_id else "length")
    expected = math.exp(-float(logs.gather(1, made[:, None]).mean()))
    assert found["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert 0 <= found["repeated_4grams"] <= 1


def test_prompts_come_from_files_and_from_the_input(
    extracted: Path, steer: Callable[..., Outcome], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("prompts.txt").write_text("good day\nhello\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    common = ("--model", model_folder, "--max-tokens", 2, "--strengths", "0", "--json")
    code, out, err = steer("try", "warm", "-p", "-", "--prompts", "prompts.txt", *common)
    assert code == 0, err
    assert [row["prompt"] for row in json.loads(out)["results"]] == ["two\nlines", "good day", "hello"]


def test_a_plain_model_answers_without_a_vector(data: Path, steer: Callable[..., Outcome], model_folder: Path) -> None:
    common = ("-p", "hello", "--max-tokens", 3, "--json")
    outcomes = [steer("try", model_folder, *common), steer("try", "--model", model_folder, *common)]
    assert outcomes[0] == outcomes[1]
    report = json.loads(outcomes[0][1])
    assert (report["expression"], report["vectors"]) == (None, {})
    assert [c["strength"] for c in report["results"][0]["completions"]] == [0]
