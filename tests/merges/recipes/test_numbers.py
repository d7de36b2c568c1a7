"""A number of a recipe is the same number in our YAML, in mergekit's and typed at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merges.recipes.document import read
from steer.training import optimisers
from vectors.errors import UsageError
from vectors.registry.values import read_assignments

OURS = """
method: della
base: base
models:
  - {{model: a, weight: {0}, density: [{0}, 0.5]}}
  - {{model: b, weight: [{{filter: mlp, value: {0}}}, {{value: 1}}]}}
parameters: {{lambda: {0}}}
"""
MERGEKIT = """
merge_method: della
base_model: base
models:
  - {{model: a, parameters: {{weight: {0}, density: [{0}, 0.5]}}}}
  - {{model: b, parameters: {{weight: [{{filter: mlp, value: {0}}}, {{value: 1}}]}}}}
parameters: {{lambda: {0}}}
"""


@pytest.mark.parametrize("document", [OURS, MERGEKIT])
@pytest.mark.parametrize(("text", "value"), [("5e-4", 5e-4), ("1e-3", 1e-3), (".5", 0.5), ('"0.9"', 0.9), ("1", 1)])
def test_a_recipe_reads_numbers_as_they_are_meant(tmp_path: Path, document: str, text: str, value: float) -> None:
    (tmp_path / "recipe.yaml").write_text(document.format(text))
    recipe = read(tmp_path / "recipe.yaml")
    assert recipe.options["lambda"] == value
    assert recipe.parts[0].options == {"weight": value, "density": [value, 0.5]}
    assert recipe.parts[1].options["weight"] == [{"filter": "mlp", "value": value}, {"value": 1}]


@pytest.mark.parametrize("document", [OURS, MERGEKIT])
@pytest.mark.parametrize(("text", "shown"), [(".nan", "nan"), (".inf", "inf"), ("1e400", "inf"), ("much", "'much'")])
def test_a_recipe_refuses_what_is_no_number_with_its_value(
    tmp_path: Path, document: str, text: str, shown: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(document.format(text))
    with pytest.raises(UsageError) as caught:
        read(tmp_path / "recipe.yaml")
    assert f"lambda is {shown}, not a number" in "\n".join(caught.value.problems)


def test_a_record_with_a_small_number_is_a_recipe(tmp_path: Path) -> None:
    recipe = {"method": "linear", "models": [{"model": "a", "weight": 1e-5}, {"model": "b"}], "parameters": {}}
    (tmp_path / "record.json").write_text(json.dumps({"recipe": recipe, "outputs": {}}))
    assert "1e-05" in (tmp_path / "record.json").read_text()
    assert read(tmp_path / "record.json").parts[0].options == {"weight": 1e-5}


@pytest.mark.parametrize("text", ["5e-9", "1e-9", ".5", "1e-08"])
def test_an_optimiser_takes_the_numbers_that_a_recipe_takes(text: str) -> None:
    options = read_assignments([f"eps={text}"])
    assert options == {"eps": float(text)}
    assert optimisers.problems_of("apollo", lr=1e-3, **options) == []
    assert optimisers.problems_of("apollo", lr=1e-3, **read_assignments(["eps=.nan"])) == ["eps is nan, not a number"]
