"""Where a setting has no value for a tensor, the next level decides: source, slice, input, document, method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folders
import pytest
import torch

from merges import api
from merges.recipes.document import parse
from merges.recipes.parameters import resolve, then, value_at
from merges.recipes.plan import plan
from merges.recipes.validation import problems_of_recipe
from vectors.errors import ModelError, UsageError

MLP = [{"filter": "mlp", "value": 0.2}]
UP, QUERY = "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"


def weights_at(document: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The weight of each input at each tensor."""
    return {
        job.name: dict(zip([i.name for i in job.inputs], job.each["weight"].tolist(), strict=True))
        for job in plan(parse(document), threads=1).jobs
    }


@pytest.mark.parametrize(("method", "base"), [("method", "base"), ("merge_method", "base_model")])
def test_filters_without_a_match_leave_it_to_the_document(here: Path, method: str, base: str) -> None:
    entry = {"weight": MLP} if method == "method" else {"parameters": {"weight": MLP}}
    document = {method: "task_arithmetic", base: "base", "models": [{"model": "a"} | entry, {"model": "b"}]}
    found = weights_at(document | {"parameters": {"weight": 0.7}})
    assert found[UP] == {"a": 0.2, "b": 0.7}
    assert found[QUERY] == {"a": 0.7, "b": 0.7}
    if method == "method":  # our methods have a default
        assert weights_at(document)[QUERY] == {"a": 1.0, "b": 1.0}
        return
    with pytest.raises(ModelError) as caught:
        plan(parse(document))
    assert "the required parameter weight has no value for a at lm_head.weight, b at" in caught.value.problems[0]
    assert "set it under the file's parameters" in caught.value.hint


def test_a_slice_stands_between_its_sources_and_the_document(here: Path) -> None:
    sources = [{"model": "a", "layers": [1, 3], "parameters": {"weight": MLP}}, {"model": "b", "layers": [0, 2]}]
    attention = [{"filter": "layers.0.self_attn", "value": 0.4}, {"filter": "layers.1.self_attn", "value": 0.5}]
    document = {
        "method": "linear",
        "models": [{"model": "a", "weight": [{"filter": "norm", "value": 0.6}]}, {"model": "b"}],
        "slices": [{"sources": sources, "parameters": {"weight": attention}}],
        "parameters": {"weight": [0.8, 1.0]},
    }
    found = weights_at(document)
    up, query, norm = (
        f"model.layers.0.{part}.weight" for part in ("mlp.up_proj", "self_attn.q_proj", "input_layernorm")
    )
    assert found[up] == {"a": 0.2, "b": 0.8}
    assert found[query] == {"a": 0.5, "b": 0.4}  # a filter sees the name in the input: a's layer 1 is the result's 0
    assert found[norm] == {"a": 0.6, "b": 0.8}
    assert found["model.layers.1.input_layernorm.weight"]["b"] == 1.0
    sources[0]["parameters"] = {"normalize": False}
    assert "a in slice 1: normalize applies to all inputs" in problems_of_recipe(parse(document))[0]


def test_switches_and_words_change_over_the_layers_too(here: Path) -> None:
    models = [{"model": name, "weight": 0.5} for name in "aab"]
    document = {
        "method": "linear",
        "models": models,
        "parameters": {"normalize": [True, 0.0, "yes"]},
        "dtype": "float32",
    }
    api.merge(parse(document), "out")
    a, b, out = (folders.read(here / name) for name in ("a", "b", "out"))
    for layer, sum_of_weights in enumerate((1.5, 1.0, 1.5)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        torch.testing.assert_close(out[name], ((a[name].float() + b[name].float() / 2) / sum_of_weights))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ([0.5, {"value": 1}], "weight can't be the list"),
        ([{"filter": 3, "value": 1}], "the filter 3 of weight is not text"),
        ([{"filter": "mlp", "value": [{"value": 1}]}], "filters inside of a filter"),
        ([{"filter": "mlp"}], "an entry has no value"),
        ([], r"weight can't be the list \[\]"),
        (None, "weight is None, not a number"),
    ],
)
def test_what_is_no_setting_is_refused(setting: Any, sentence: str) -> None:
    ours = parse({"method": "linear", "models": [{"model": "a", "weight": setting}, {"model": "b"}]})
    problems = "\n".join(problems_of_recipe(ours))
    assert sentence.replace("\\", "") in problems
    if setting == []:
        return  # mergekit: sets nothing
    theirs = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": setting}}, {"model": "b"}]}
    with pytest.raises(UsageError):
        parse(theirs)


def test_resolving_takes_the_first_level_with_a_value() -> None:
    levels = ({"t": MLP}, {}, {"t": [{"filter": "layers.1", "value": [0, 1]}]}, {"t": 3})
    assert [resolve("t", levels, name, 0.25) for name in (UP, QUERY, "lm_head.weight")] == [0.2, 0.25, 3]
    assert resolve("t", levels[:3], "lm_head.weight", 0) is None
    assert value_at(then(MLP, then([{"filter": "attn", "value": 1}], 5)), "lm_head.weight", 0) == 5
    assert then(0.5, MLP) == 0.5
