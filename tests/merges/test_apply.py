"""A base plus a vector, or an expression over vectors, as a model folder."""

from __future__ import annotations

from pathlib import Path

import folders
import pytest
import torch

from merges import api
from vectors.errors import ExpressionError


def test_an_exact_vector_by_its_path_or_its_name_restores_the_fine_tuned_model(here: Path) -> None:
    api.diff("base", "a", "tuned.safetensors")
    api.apply("base", "tuned.safetensors", "by-path")
    api.apply("base", "tuned", "by-name")
    api.apply("base", "v", "bound", vectors={"v": here / "tuned.safetensors"})
    for out in ("by-path", "by-name", "bound"):
        assert folders.same(here / out, here / "a")


def test_an_expression_in_another_dtype(here: Path) -> None:
    api.diff("base", "a", "v.safetensors")
    api.apply("base", "1.5*v - v", "out", dtype="float32")
    base, tuned = folders.read(here / "base"), folders.read(here / "a")
    for name, tensor in folders.read(here / "out").items():
        torch.testing.assert_close(tensor, 0.5 * (base[name].float() + tuned[name].float()))


def test_all_names_without_a_file_are_refused_together(here: Path) -> None:
    with pytest.raises(ExpressionError) as caught:
        api.apply("base", "one + 0.5*two", "out")
    assert len(caught.value.problems) == 2
    with pytest.raises(ExpressionError, match=r"there is no file nowhere.safetensors"):
        api.apply("base", "nowhere.safetensors", "out")
    assert not (here / "out").exists()
