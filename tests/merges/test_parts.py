"""Adapters, slices, vocabularies, mergekit's files, steering vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merges import api, steering
from merges.api import diff
from merges.inputs import adapters
from merges.outputs import adapter as lora_out
from merges.recipes.document import parse
from merges.recipes.recipe import Part, Recipe, Tokenizer, TokenSource
from vectors.errors import ArtifactError, ModelError
from vectors.steering import SteeringVector

NAME = "model.layers.1.self_attn.q_proj"


def adapter(
    folder: Path, *, rank: int = 2, config: dict[str, Any] | None = None, extra: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """A PEFT folder for the query projection of layer 1; returns its tensors."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(5)
    tensors = {
        f"base_model.model.{NAME}.lora_A.weight": torch.randn(rank, 8, generator=draw),
        f"base_model.model.{NAME}.lora_B.weight": torch.randn(8, rank, generator=draw),
    } | (extra or {})
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(settings | (config or {})))
    return tensors


def part(name: str, **options: Any) -> Part:
    return Part(name, Path(name).stem, options)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.self_attn.q_proj": 2}}, 0.5),
        ({"fan_in_fan_out": True}, 3.0),
    ],
)
def test_an_adapter_is_a_delta(here: Path, config: dict[str, Any], scale: float) -> None:
    head = torch.randn(20, 8)
    tensors = adapter(here / "lora", config=config, extra={"base_model.model.lm_head.modules_to_save.weight": head})
    api.merge(Recipe("task_arithmetic", (part("lora", weight=0.5),), "base", dtype="float32"), "out")
    api.merge(Recipe("linear", (part("base+lora"),), dtype="float32"), "on")
    base, out, on = (folders.read(here / name) for name in ("base", "out", "on"))
    delta = scale * (
        tensors[f"base_model.model.{NAME}.lora_B.weight"].double()
        @ tensors[f"base_model.model.{NAME}.lora_A.weight"].double()
    )
    delta = delta.T if config.get("fan_in_fan_out") else delta
    for name, before in base.items():
        change = delta if name == f"{NAME}.weight" else torch.zeros(()).double()
        if name == "lm_head.weight":
            change = head.double() - before.double()
        np.testing.assert_allclose(out[name], before.double() + 0.5 * change, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(on[name], before.double() + change, rtol=1e-5, atol=1e-6)


def test_bad_adapters_are_refused_with_every_problem(here: Path) -> None:
    adapter(
        here / "bad",
        config={"use_dora": True},
        extra={
            "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(2, 8),
            "base_model.model.nothing.weight": torch.ones(3),
        },
    )
    with pytest.raises(ModelError) as caught:
        api.merge(Recipe("task_arithmetic", (part("bad"),), "base"), "out")
    found = "\n".join(caught.value.problems)
    for sentence in (
        "uses DoRA",
        "only one factor of model.layers.7.mlp.up_proj",
        "nothing.weight, which fits no parameter",
    ):
        assert sentence in found


def test_to_lora_and_back_loses_the_tail_of_the_singular_values(here: Path) -> None:
    base = folders.weights(0, "F32")
    draw = torch.Generator().manual_seed(3)
    low = {
        n: t
        + (
            torch.randn(t.shape[0], 2, generator=draw) @ torch.randn(2, t.shape[1], generator=draw)
            if "proj" in n
            else 0
        )
        for n, t in sorted(base.items())
    }
    folders.write(here / "fbase", base)
    folders.write(here / "low", low)
    report = lora_out.from_models("fbase", "low", here / "lora", 2)
    assert report["left_out"] == []
    assert report["relative_error"] < 1e-6
    api.merge(Recipe("task_arithmetic", (part("lora"),), "fbase"), "again")
    for name, tensor in folders.read(here / "again").items():
        np.testing.assert_allclose(tensor, low[name], rtol=1e-5, atol=1e-5)
    report = lora_out.from_models("fbase", "low", here / "lora1", 1)
    d = {n: (low[n] - base[n]).double().numpy() for n in base}
    tails = sum((np.linalg.svd(v, compute_uv=False)[1:] ** 2).sum() for n, v in d.items() if "proj" in n)
    assert report["relative_error"] == pytest.approx((tails / sum((v**2).sum() for v in d.values())) ** 0.5, rel=1e-5)
    assert set(load_file(here / "lora1" / "adapter_model.safetensors")) == {
        f"base_model.model.{n.removesuffix('.weight')}.lora_{side}.weight" for n in base if "proj" in n for side in "AB"
    }


def test_factors_of_a_large_matrix_are_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "SMALL", 100)
    draw = np.random.default_rng(0)
    matrix = (draw.standard_normal((260, 40)) * 0.9 ** np.arange(40)) @ draw.standard_normal((40, 220))
    matrix += 0.01 * draw.standard_normal(matrix.shape)
    _, _, error = adapters.factors(matrix, 8)
    values = np.linalg.svd(matrix, compute_uv=False)
    assert error <= 1.01 * np.sqrt((values[8:] ** 2).sum() / (values**2).sum())


def test_a_merge_of_an_adapter_and_a_vector_becomes_an_adapter(here: Path) -> None:
    adapter(here / "lora")
    diff("base", "a", "a.safetensors")
    report = lora_out.from_recipe(
        Recipe("task_arithmetic", (part("lora"), part("a.safetensors")), "base", as_="vector"), here / "both", 8
    )
    assert set(report["left_out"]) == {n for n in folders.read(here / "base") if "proj" not in n}


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
    assert "layers up to 8 of a, which has 3" in caught.value.problems[1] + caught.value.problems[0]
    assert "different numbers of layers" in "".join(caught.value.problems)


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
    with pytest.raises(ModelError, match="'z' is to come from 'q' of v1, which has no such token"):
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


def test_steering_vectors_merge_by_the_same_methods() -> None:
    draw = torch.Generator().manual_seed(0)
    base = {"base": {"digest": "sha256:x"}}
    a, b = (SteeringVector({i: torch.randn(40, generator=draw) for i in (3, 4)}, base) for _ in range(2))
    found = steering.merge(Recipe("ties", (part("a", density=0.5), part("b", density=0.5))), [a, b])
    for i in (3, 4):
        kept = [
            torch.where(
                v.layers[i].abs() >= v.layers[i].abs().sort(descending=True).values[19], v.layers[i], 0
            ).double()
            for v in (a, b)
        ]
        sign = (kept[0] + kept[1]).sign()
        agree = [(k * sign > 0) for k in kept]
        count = (agree[0].int() + agree[1].int()).clamp(min=1)
        assert torch.equal(found.layers[i], ((kept[0] * agree[0] + kept[1] * agree[1]) / count).float())
    summed = steering.merge(Recipe("task_arithmetic", (part("a", weight=2), part("b", weight=-1))), [a, b])
    torch.testing.assert_close(summed.layers[3], 2 * a.layers[3] - b.layers[3])
    assert summed.base["digest"] == "sha256:x"
    with pytest.raises(ArtifactError, match="different models"):
        steering.merge(
            Recipe("ties", (part("a"), part("c"))), [a, SteeringVector(b.layers, {"base": {"digest": "sha256:y"}})]
        )


def test_a_method_from_a_file_of_its_own_needs_only_numpy(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merges import methods
    from merges.engine.method import MergeMethod

    def combine(_task: Any, block: Any, _prepared: Any) -> np.ndarray:
        return np.take_along_axis(block.values, np.abs(block.values).argmax(0)[None], 0)[0]

    greatest = MergeMethod(name="greatest", summary="", source="", space="delta", base="needed", combine=combine)
    known = dict(methods.available())
    monkeypatch.setattr(methods, "available", lambda: known | {"greatest": greatest})
    api.merge(Recipe("greatest", (part("a"), part("b")), "base", dtype="float32"), "out")
    base, a, b, out = (folders.read(here / name) for name in ("base", "a", "b", "out"))
    name = "lm_head.weight"
    d = torch.stack([a[name].float() - base[name].float(), b[name].float() - base[name].float()])
    torch.testing.assert_close(out[name], base[name].float() + d.gather(0, d.abs().argmax(0)[None])[0])


def test_an_adapter_that_was_trained_on_another_model_is_spoken_of(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merges.recipes.plan import plan
    from vectors import references

    monkeypatch.setattr(references, "resolve", lambda name: references.ModelSource(Path(name), f"org/{name}", "r"))
    for trained, notes in (
        ("org/base", []),
        ("org/other", ["lora says that it was trained on org/other; here it stands on org/base"]),
    ):
        adapter(here / "lora", config={"base_model_name_or_path": trained})
        for made in (Recipe("task_arithmetic", (part("lora"),), "base"), Recipe("linear", (part("base+lora"),))):
            assert [note.replace("base+lora", "lora") for note in plan(made).notes] == notes
        (here / "lora").rename(here / trained.replace("/", "-"))
