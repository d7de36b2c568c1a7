"""Tensors that a model computes are no difference between two models, though older files store them."""

from __future__ import annotations

from pathlib import Path

import folders
import pytest
import torch

from merges import api
from merges.outputs.pairs import open_pair
from merges.recipes.document import parse
from merges.recipes.plan import plan
from vectors.errors import ModelError

FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"
MASK, MASKED = "model.layers.0.attn.bias", "model.layers.0.attn.masked_bias"
COMPUTED = {FREQUENCIES: torch.arange(4.0), MASK: torch.ones(1, 1, 4, 4), MASKED: torch.tensor(-1e4)}


def recipe(*names: str) -> dict[str, object]:
    return {"method": "linear", "models": [{"model": name} for name in names]}


@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")])
def test_what_models_compute_is_left_out_where_not_all_store_it(here: Path, order: tuple[str, str]) -> None:
    folders.write(here / "old", folders.weights(0, "F32") | COMPUTED)
    folders.write(here / "new", folders.weights(1, "F32"))
    made = plan(parse(recipe(*order)))
    assert any(FREQUENCIES in note and "of old are left out" in note for note in made.notes)
    api.merge(parse(recipe(*order)), "out")
    assert folders.read(here / "out").keys() == folders.weights(0, "F32").keys()
    open_pair(*order)


def test_what_all_models_store_stays(here: Path) -> None:
    for seed, name in enumerate(("x", "y")):
        folders.write(here / name, folders.weights(seed, "F32") | COMPUTED)
    api.merge(parse(recipe("x", "y")), "out")
    assert COMPUTED.keys() <= folders.read(here / "out").keys()


def test_a_bias_that_only_one_model_has_is_still_refused(here: Path) -> None:
    folders.write(here / "x", folders.weights(0, "F32") | {MASK: torch.ones(8)})
    folders.write(here / "y", folders.weights(1, "F32"))
    with pytest.raises(ModelError, match=MASK):
        plan(parse(recipe("x", "y")))
