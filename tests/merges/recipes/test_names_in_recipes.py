"""Names in a recipe are text, also those that look like a number or a switch."""

from __future__ import annotations

from pathlib import Path

import pytest

from merges.recipes.document import read
from vectors.errors import UsageError

NAMES = ["1e3", "010", "1_000", "2024", ".5", "yes", "off", "true", "0x1f", "1:30", "+1", ".inf"]


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_inputs_models_and_bases_stay_as_they_are_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "ours.yaml").write_text(
        f"method: linear\nbase: {name}\nmodels: [{{model: {name}, name: {name}, weight: 1e3}}, {{model: b}}]\n"
    )
    recipe = read(tmp_path / "ours.yaml")
    assert (recipe.base, recipe.parts[0].model, recipe.parts[0].name) == (name, name, name)
    assert recipe.parts[0].options["weight"] == 1000.0


@pytest.mark.parametrize("name", NAMES)
def test_those_of_mergekits_files_too(tmp_path: Path, name: str) -> None:
    (tmp_path / "theirs.yaml").write_text(
        f"merge_method: linear\nmodels:\n- {{model: {name}, parameters: {{weight: 1e3}}}}\n"
        f"- {{model: {{model: {{path: b, revision: {name}}}}}, parameters: {{weight: 1}}}}\n"
    )
    recipe = read(tmp_path / "theirs.yaml")
    assert [part.model for part in recipe.parts] == [name, f"b@{name}"]
    assert recipe.parts[0].options["weight"] == 1000.0


def test_a_name_behind_an_alias_stays_text_and_the_number_a_number(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("method: linear\nmodels: [{model: b, weight: &n 1e3, name: *n}, {model: c}]\n")
    (part, _) = read(tmp_path / "a.yaml").parts
    assert (part.name, part.options["weight"]) == ("1e3", 1000.0)


@pytest.mark.parametrize("name", ["[a]", "{a: b}", "null"])
def test_a_name_that_is_no_text_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.yaml").write_text(f"method: linear\nmodels: [{{model: b, name: {name}}}, {{model: c}}]\n")
    with pytest.raises(UsageError, match=r"the name of b is .*, not text"):
        read(tmp_path / "a.yaml")
