"""What is wrong with a recipe is reported together: its document, options, inputs, shapes, settings and output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folders
import pytest
import torch

from merges import api
from merges.recipes.document import draft, read
from steer.cli import run
from vectors.errors import SteerError, UsageError


@pytest.fixture
def odd(here: Path) -> Path:
    """`theta` has another rope base than `base`; `lacking` lacks a tensor and has one of another shape."""
    weights = folders.tuned(folders.weights(0), 1)
    folders.write(here / "theta", weights, config={"rope_theta": 5e5})
    odd = {n: t for n, t in weights.items() if n != "model.norm.weight"}
    odd["model.layers.1.mlp.up_proj.weight"] = torch.ones(25, 8).bfloat16()
    folders.write(here / "lacking", odd)
    return here


OF_INPUTS = (
    "there is no model 'nowhere'",
    "rope_theta is",
    "lacking lacks model.norm.weight",
    "model.layers.1.mlp.up_proj.weight is [25, 8] in lacking",
)
OURS = {
    "method": "teis",
    "base": "base",
    "models": [
        {"model": "theta"}, {"model": "nowhere"}, {"model": "lacking", "name": 5}, {"weight": 1}, {"model": "a"},
    ],
    "modles": [],
    "scope": "globl",
    "tokenizer": {"sorce": "union"},
    "seed": "x",
}  # fmt: skip
THEIRS = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": "theta", "parameters": {"densty": 1}}, {"model": "nowhere"}, {"model": "lacking"},
        {"parameters": {}},
    ],
    "parameters": {"normalize": "maybe", "density": 1.5},
    "dtype": "bfloat61",
}  # fmt: skip
COMMON = (*OF_INPUTS, "the output out exists")


@pytest.mark.parametrize(
    ("document", "sentences"),
    [
        (
            OURS,
            ("'modles'", "there is no merge method 'teis' (did you mean ties?)", "the name of lacking is 5",
             "entry 4 has none", "did you mean global?", "'sorce' in tokenizer", 'seed is "x"'),
        ),
        (
            THEIRS,
            ("'densty' (did you mean density?)", "an entry of models has no model", "normalize is 'maybe'",
             "density is 1.5, outside [0, 1]", "did you mean bfloat16?"),
        ),
        (
            THEIRS | {"merge_method": "teis"},
            ("unknown mergekit method 'teis' (did you mean ties?)", "an entry of models has no model"),
        ),
    ],
)  # fmt: skip
def test_faults_of_different_kinds_are_reported_at_once(
    odd: Path, document: dict[str, Any], sentences: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (odd / "r.yaml").write_text(json.dumps(document))
    (odd / "out").mkdir()
    assert run(["merge", "--recipe", "r.yaml", "-o", "out", "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    for sentence in (*sentences, *COMMON):
        assert sum(sentence in problem for problem in problems) == 1, (sentence, problems)
    with pytest.raises(SteerError) as caught:  # from Python too
        api.merge(draft(Path("r.yaml")), "out")
    assert set(caught.value.problems) == set(problems)
    with pytest.raises(UsageError):
        read(odd / "r.yaml")


def test_faults_of_a_command_and_of_its_inputs_are_reported_at_once(
    odd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["merge", "theta", "nowhere", "lacking", "--base", "base", "--weights", "1,2", "--density", "much"]
    assert run([*command, "--set", "elect", "--scope", "globl", "--without", "nobody", "-o", "a", "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    for sentence in (
        *OF_INPUTS, "no method is given", "--weights has 2 numbers; there are 3 inputs", "--density is 'much'",
        "elect", "did you mean global?", "no input 'nobody'", "the output a exists",
    ):  # fmt: skip
        assert sum(sentence in problem for problem in problems) == 1, (sentence, problems)


def test_settings_and_shapes_of_a_valid_recipe_are_reported_at_once(odd: Path) -> None:
    with pytest.raises(SteerError) as caught:
        api.merge(folders.recipe("theta", "lacking"), "out")
    for sentence in OF_INPUTS[1:]:
        assert any(sentence in problem for problem in caught.value.problems), sentence


def test_diff_and_apply_report_everything_at_once(odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["diff", "nowhere", "neither", "-o", "a.txt", "--storage", "zip", "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    for sentence in ("'nowhere'", "'neither'", "must end in .safetensors", "no storage 'zip'"):
        assert sum(sentence in problem for problem in problems) == 1, (sentence, problems)
    assert run(["apply", "nowhere", "a + b + ablate(c)", "-o", "a", "--dtype", "float61", "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    for sentence in ("'nowhere'", "the name 'b' is not bound", "did you mean float", "the output a exists"):
        assert sum(sentence in problem for problem in problems) == 1, (sentence, problems)


@pytest.mark.parametrize("name", ["r.yml", "r.yaml", "run.json"])
def test_a_recipe_given_as_an_input_gets_the_command_that_takes_it(
    here: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (here / name).write_text("{}")
    assert run(["merge", name, "-o", "out"]) == 2
    assert f"hint: steer merge --recipe {name} -o OUT" in capsys.readouterr().err


def test_a_base_that_an_adapter_names_and_is_not_there_is_one_problem(here: Path) -> None:
    folders.adapter(here / "lora", config={"base_model_name_or_path": "/no/such/base"})
    with pytest.raises(SteerError) as caught:
        api.merge(folders.recipe("lora", base=None, method="task_arithmetic"), "out")
    assert not any("needs a base model" in problem for problem in caught.value.problems)
    assert any("lora names /no/such/base as its base" in problem for problem in caught.value.problems)


def test_a_request_for_a_vocabulary_that_is_not_understood_is_no_fault_of_the_inputs(here: Path) -> None:
    folders.write(here / "other", folders.tuned(folders.weights(0), 1), tokenizer=True)
    folders.exchange_two_tokens(here / "other")
    document = {"method": "ties", "base": "base", "models": [{"model": "other"}], "tokenizer": {"sorce": "union"}}
    (here / "r.yaml").write_text(json.dumps(document))
    with pytest.raises(SteerError) as caught:
        api.merge(draft(Path("r.yaml")), "out")
    assert caught.value.problems == ("r.yaml: unknown key 'sorce' in tokenizer (did you mean source?)",)


def test_a_refused_stack_of_layers_is_not_compared_as_another_method_would(here: Path) -> None:
    folders.write(here / "short", folders.weights(0, layers=2))
    parts = (("short", [0, 2]), ("base", [1, 3]))
    slices = [{"sources": [{"model": name, "layers": layers}]} for name, layers in parts]
    models = [{"model": name} for name, _ in parts]
    document = {"method": "passthrough", "base": "short", "models": models, "slices": slices, "bogus": 1}
    (here / "r.yaml").write_text(json.dumps(document))
    with pytest.raises(SteerError) as caught:
        api.merge(draft(Path("r.yaml")), "out")
    assert caught.value.problems == ("r.yaml: unknown key 'bogus'",)
