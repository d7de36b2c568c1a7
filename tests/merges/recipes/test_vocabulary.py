"""Models with different tokenizers: one vocabulary, and where each token's row comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pytest
import torch

from merges import api
from merges.recipes.document import parse
from merges.recipes.recipe import Part, Recipe, Tokenizer, TokenSource
from vectors.errors import ModelError


def part(name: str, **options: Any) -> Part:
    return Part(name, Path(name).stem, options)


def vocabulary(folder: Path, tokens: list[str], seed: int) -> dict[str, torch.Tensor]:
    """A model with a small tokenizer of these tokens; row i belongs to token i."""
    rows = folders.weights(seed, "F32")
    draw = torch.Generator().manual_seed(seed)
    rows["model.embed_tokens.weight"] = torch.randn(len(tokens), 8, generator=draw)
    rows["lm_head.weight"] = torch.randn(len(tokens), 8, generator=draw)
    folders.write(folder, rows, config={"vocab_size": len(tokens)})
    content = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return rows


def test_a_union_of_vocabularies_takes_each_row_from_who_has_it(here: Path) -> None:
    base = vocabulary(here / "vb", ["x", "y", "z"], 1)
    one = vocabulary(here / "v1", ["y", "x", "new", "both"], 2)
    two = vocabulary(here / "v2", ["x", "z", "both"], 3)
    with pytest.raises(ModelError, match="vocabularies differ"):
        api.merge(Recipe("linear", (part("v1"), part("v2")), "vb"), "no")
    made = Recipe(
        "linear",
        (part("vb"), part("v1"), part("v2")),
        "vb",
        tokenizer=Tokenizer(tokens={"z": TokenSource("v2")}),
    )
    api.merge(made, "out")
    found = folders.read(here / "out")["model.embed_tokens.weight"]
    rows = [m["model.embed_tokens.weight"].double() for m in (base, one, two)]
    assert found.shape[0] == 5
    expected = {
        0: (rows[0][0] + rows[1][1] + rows[2][0]) / 3,  # x, which all have
        1: (rows[0][1] + rows[1][0] + rows[0][1]) / 3,  # y: v2 lacks it, so the base's row stands for it
        2: rows[2][1],  # z: asked for from v2
        3: rows[1][2],  # new: the one model that has it
        4: ((rows[1][3] + rows[2][2]) / 2 + rows[1][3] + rows[2][2]) / 3,  # both: the base has the mean of the two
    }
    for row, value in expected.items():
        np.testing.assert_allclose(found[row], value, rtol=1e-5, atol=1e-6)
    tokenizer = json.loads((here / "out" / "tokenizer.json").read_text())
    assert [(t["content"], t["id"]) for t in tokenizer["added_tokens"]] == [("new", 3), ("both", 4)]
    assert json.loads((here / "out" / "config.json").read_text())["vocab_size"] == 5


def test_tokens_are_forced_filled_in_and_padded(here: Path) -> None:
    one = vocabulary(here / "v1", ["x", "y"], 1)
    two = vocabulary(here / "v2", ["x", "z", "w"], 2)
    tokens = {
        "x": TokenSource("v2", "w"),  # another token's row, for both
        "y": TokenSource("zero", force=False),  # for v2 alone, which lacks it
        "z": TokenSource("v1", 1),  # by its id
        "w": TokenSource("v2", force=False),
    }
    request = Tokenizer("union", tokens, pad_to_multiple_of=8)
    parts = (part("v1", weight=0.25), part("v2", weight=0.75))
    api.merge(Recipe("linear", parts, tokenizer=request), "out")
    found = folders.read(here / "out")["model.embed_tokens.weight"].double()
    a, b = (m["model.embed_tokens.weight"].double() for m in (one, two))
    rows = [b[2], 0.25 * a[1], a[1], b[2]]
    for row, value in enumerate(rows):
        np.testing.assert_allclose(found[row], value, rtol=1e-5, atol=1e-6)
    assert found.shape[0] == 8
    for row in found[4:]:
        np.testing.assert_allclose(row, torch.stack(rows).mean(0), rtol=1e-5, atol=1e-6)
    assert json.loads((here / "out" / "config.json").read_text())["vocab_size"] == 8
    with pytest.raises(ModelError, match="the source of the token 'z' is 'q' of v1, which has no such token"):
        api.merge(Recipe("linear", parts, tokenizer=Tokenizer(tokens={"z": TokenSource("v1", "q")})), "no")


def test_slices_share_one_vocabulary_too(here: Path) -> None:
    vocabulary(here / "v1", ["x", "y"], 1)
    vocabulary(here / "v2", ["x", "z", "w"], 2)
    models = [{"model": "v1"}, {"model": "v2"}]
    whole = {"method": "linear", "models": models, "tokenizer": {"source": "union"}}
    sources = [{"model": name, "layers": [0, 3]} for name in ("v1", "v2")]
    api.merge(parse(whole), "plain")
    api.merge(parse(whole | {"slices": [{"sources": sources}]}), "sliced")
    assert folders.same(here / "plain", here / "sliced")
    assert (here / "plain" / "tokenizer.json").read_bytes() == (here / "sliced" / "tokenizer.json").read_bytes()
