"""Every parameter has, at every tensor, the value that mergekit 0.1.5 gives it: a grid of documents, recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folders
import mergekit_grid
import pytest

from merges import methods
from merges.engine.tensor_task import TensorTask
from merges.recipes.document import parse
from merges.recipes.mergekit.words import DEFAULTS, EACH, METHODS, REQUIRED
from merges.recipes.plan import plan
from vectors.errors import SteerError

RECORDED = json.loads(mergekit_grid.RECORDED.read_text())
GRID = RECORDED["grid"]
UNKNOWN = {"ram", "ramplus_tl"}  # methods of mergekit that we lack


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    for name in ("base", "a", "b"):
        folders.write(folder / name, folders.weights(0), config=mergekit_grid.HEADS)
    return folder


def values_of(document: Mapping[str, Any], folder: Path) -> dict[str, list[Any]]:
    """Our value of each of mergekit's parameters at each tensor, in mergekit's words."""
    found: dict[str, list[Any]] = {}
    words = METHODS[document["merge_method"]]
    placed = mergekit_grid.placed(document, folder)
    for job in plan(parse(placed), threads=1).jobs:
        assert isinstance(job, TensorTask)
        at = mergekit_grid.TENSORS.index(job.name)
        for name, word in words.items():
            if word.option is None or word.option == "along":
                continue
            back = {ours: theirs for theirs, ours in word.values.items()}
            if word.option in job.each:
                pairs = [
                    (f"{name} {given.name}", value)
                    for given, value in zip(job.inputs, job.each[word.option].tolist(), strict=True)
                ]
            else:
                value = job.options[word.option]
                pairs = [(name, back.get(value, value))]
            for key, value in pairs:
                found.setdefault(key, [None] * len(mergekit_grid.TENSORS))[at] = value
    return found


def check(row: Mapping[str, Any], models: Path) -> None:
    """Our values are those of mergekit's answer; what it refuses, we refuse too."""
    document, answer = row["document"], row["answer"]
    words = METHODS[document["merge_method"]]
    if "error" in answer:
        with pytest.raises(SteerError) as caught:
            values_of(document, models)
        missing = answer["error"].partition("Missing required parameter ")[2].partition(" ")[0]
        assert f"the required parameter {missing} has no value" in str(caught.value) or not missing, document
        return
    ours = values_of(document, models)
    for key, value in answer.items():
        if key not in ours:
            assert words[key.partition(" ")[0]].option in (None, "along"), key
            continue
        row_ = value if isinstance(value, list) else [value] * len(mergekit_grid.TENSORS)
        pairs = [(mine, 1.0 if v is None else v) for mine, v in zip(ours[key], row_, strict=True) if mine is not None]
        assert [mine for mine, _ in pairs] == pytest.approx([v for _, v in pairs], abs=1e-8), (key, document)
    assert ours.keys() <= answer.keys(), document


@pytest.mark.parametrize("method", mergekit_grid.METHODS)
def test_every_parameter_has_mergekits_value_at_every_tensor(models: Path, method: str) -> None:
    rows = [row for row in GRID if row["document"]["merge_method"] == method]
    assert len(rows) >= 30
    for row in rows:
        check(row, models)


def test_the_grid_is_what_the_script_draws() -> None:
    assert [row["document"] for row in GRID] == json.loads(json.dumps(mergekit_grid.documents()))


def test_methods_and_parameters_are_those_of_mergekit() -> None:
    theirs = RECORDED["methods"]
    assert set(METHODS) == set(theirs) - UNKNOWN
    for method, words in METHODS.items():
        assert set(words) == set(theirs[method]), method
        options = {option.name: option for option in methods.find(method).options}
        for name, word in words.items():
            assert (theirs[method][name]["default"] == "required") == (name in REQUIRED), (method, name)
            if word.option in (None, "along"):
                continue
            assert (theirs[method][name]["scope"] != "shared") == options[word.option].each == (name in EACH)
            default = DEFAULTS.get(method, {}).get(word.option, options[word.option].default)
            if name not in REQUIRED and name != "scale":
                assert word.values.get(theirs[method][name]["default"], theirs[method][name]["default"]) == default
