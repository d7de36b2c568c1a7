"""Slices: layers of several models stacked into one, and merged."""

from __future__ import annotations

import json
from pathlib import Path

import folders
import numpy as np
import pytest
import torch

from merges import api
from merges.recipes.document import parse
from vectors.errors import ModelError


def test_slices_stack_layers_in_their_order(here: Path) -> None:
    stacked = parse(
        {
            "method": "passthrough",
            "models": [{"model": "a"}, {"model": "b"}],
            "slices": [
                {"sources": [{"model": "a", "layers": [0, 2]}]},
                {"sources": [{"model": "b", "layers": [1, 3]}]},
                {"sources": [{"model": "a", "layers": [2, 3], "parameters": {"scale": 2.0}}]},
            ],
        }
    )
    api.merge(stacked, "out")
    a, b, out = (folders.read(here / name) for name in ("a", "b", "out"))
    assert json.loads((here / "out" / "config.json").read_text())["num_hidden_layers"] == 5
    up = "model.layers.{}.mlp.up_proj.weight"
    for place, (model, layer) in enumerate([(a, 0), (a, 1), (b, 1), (b, 2)]):
        assert torch.equal(out[up.format(place)], model[up.format(layer)])
    assert torch.equal(out[up.format(4)], 2 * a[up.format(2)])
    assert torch.equal(out["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert len(out) == 3 * 5 + 3


def test_the_last_slice_merges_head_and_norm_from_all_its_sources(here: Path) -> None:
    made = parse(
        {
            "method": "linear",
            "models": [{"model": "a"}, {"model": "b"}],
            "dtype": "float32",
            "slices": [
                {"sources": [{"model": "a", "layers": [0, 1]}]},
                {
                    "sources": [
                        {"model": "a", "layers": [1, 3]},
                        {"model": "b", "layers": [1, 3], "parameters": {"weight": 3}},
                    ]
                },
            ],
        }
    )
    api.merge(made, "out")
    a, b, out = (folders.read(here / name) for name in ("a", "b", "out"))
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.2.mlp.up_proj.weight"):
        np.testing.assert_allclose(out[name], 0.25 * a[name].double() + 0.75 * b[name].double(), rtol=1e-6)
    assert torch.equal(out["model.layers.0.mlp.up_proj.weight"], a["model.layers.0.mlp.up_proj.weight"].float())


def test_slices_that_do_not_exist_are_refused(here: Path) -> None:
    slices = [
        {"sources": [{"model": "a", "layers": [0, 9]}]},
        {"sources": [{"model": "a", "layers": [0, 1]}, {"model": "b", "layers": [0, 2]}]},
    ]
    with pytest.raises(ModelError) as caught:
        api.merge(parse({"method": "linear", "models": [{"model": "a"}, {"model": "b"}], "slices": slices}), "out")
    assert "layers up to 8 of a, whose decoder has 3" in caught.value.problems[1] + caught.value.problems[0]
    assert "different numbers of layers" in "".join(caught.value.problems)
