"""What can't be merged is refused with every problem, before any work, and nothing appears."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folders
import pytest
import torch
from folders import recipe

from merges import api
from merges.api import diff
from merges.recipes.document import parse
from merges.recipes.recipe import Part, Recipe
from vectors.errors import ArtifactError, ModelError, OutputError, SteerError, UsageError
from vectors.task import TaskVector


def refused(made: Recipe, kind: type[SteerError], *sentences: str, out: str = "out") -> SteerError:
    """The merge is refused with all of these, and nothing appears."""
    with pytest.raises(kind) as caught:
        api.merge(made, out)
    for sentence in sentences:
        assert any(sentence in problem for problem in caught.value.problems), (sentence, caught.value.problems)
    assert not list(Path().glob(".out*"))
    return caught.value


def test_bad_numbers_and_words_are_refused_together(here: Path) -> None:
    parts = (Part("a", "a", {"density": -0.1, "wieght": 1}), Part("b", "b", {"density": 1.5, "lambda": 2}))
    error = refused(
        Recipe("ties", parts, "base", {"elect": "bfore"}, scope="globl", dtype="bfloat61"), UsageError,
        "density is -0.1, outside [0, 1]", "density is 1.5, outside [0, 1]",
        "no option 'wieght' (did you mean weight?)",
        "lambda applies to all inputs", "did you mean before?", "did you mean global?", "did you mean bfloat16?",
    )  # fmt: skip
    assert len(error.problems) == 7
    refused(recipe("a", method="teis"), UsageError, "there is no merge method 'teis' (did you mean ties?)")
    refused(recipe("a=0", "b=0"), UsageError, "all weights are zero")
    refused(recipe("a=1", "b=-1", method="linear"), UsageError, "the weights sum to zero")
    refused(recipe("a", method="slerp"), UsageError, "slerp takes 2 inputs; there is 1")
    refused(
        recipe("a", "b", method="della", options={"density": 0.95}),
        ModelError,
        "density 0.95 with epsilon 0.15 gives probabilities",
    )


def test_models_that_do_not_fit_are_refused_with_every_misfit(here: Path) -> None:
    base = folders.weights(0)
    lacking = {n: t for n, t in folders.tuned(base, 1).items() if n != "model.norm.weight"}
    folders.write(here / "lacking", lacking)
    folders.write(here / "extra", folders.tuned(base, 2) | {"model.more.weight": torch.ones(3)})
    folders.write(here / "shape", folders.tuned(base, 3) | {"lm_head.weight": torch.ones(21, 8).bfloat16()})
    folders.write(here / "other", folders.tuned(base, 4), config={"architectures": ["Qwen2ForCausalLM"]})
    refused(
        recipe("lacking", "extra", "shape"), ModelError,
        "lacking lacks model.norm.weight", "extra has tensors that the others lack: model.more.weight",
        "lm_head.weight is [21, 8] in shape, [20, 8] in base",
    )  # fmt: skip
    refused(recipe("other"), ModelError, "other is a Qwen2ForCausalLM, base a LlamaForCausalLM")
    refused(recipe("nowhere", "neither"), ModelError, "'nowhere'", "'neither'")
    assert "--base MODEL" in refused(recipe("a", base=None), ModelError, "none is given").hint
    # A hint that fits: no base would make one family of two, and other names than biases are no fold's.
    alone = refused(
        recipe("a", "other", base=None, method="linear"), ModelError, "a is a LlamaForCausalLM, other a Qwen2"
    )
    assert "--base" not in alone.hint
    for tuned in ("other", "lacking"):
        with pytest.raises(ModelError) as caught:
            diff("base", tuned, "x.safetensors")
        assert caught.value.hint == "a task vector needs a base and a model that was fine-tuned from it"


def test_a_vector_for_another_base_is_refused(here: Path) -> None:
    diff("base", "a", "v.safetensors")
    refused(recipe("v.safetensors", base="b"), ModelError, "v.safetensors belongs to the base sha256:")
    assert (here / "v.safetensors").exists()


@pytest.mark.parametrize("damage", ["truncate", "header", "offsets"])
def test_corrupt_shards_are_refused(here: Path, damage: str) -> None:
    path = here / "b" / "model-00002-of-00003.safetensors"
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[:-10])
    elif damage == "header":
        path.write_bytes(b"\xff" * 8 + content[8:])
    else:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        first = next(k for k in header if k != "__metadata__")
        header[first]["data_offsets"][1] += 2
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    refused(recipe("a", "b"), ModelError, f"{path.relative_to(here)} is damaged")


def test_a_damaged_vector_is_refused(here: Path) -> None:
    vector = diff("base", "a", "v.safetensors")
    content = bytearray((here / "v.safetensors").read_bytes())
    (here / "v.safetensors").write_bytes(content[:-5])
    refused(recipe("v.safetensors"), ModelError, "ends before")
    content[-1] ^= 1
    (here / "v.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        api.merge(recipe("v.safetensors"), "out")
    assert not (here / "out").exists()
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        TaskVector.open("v.safetensors").verify()
    assert vector.exact


def test_an_output_that_exists_or_does_not_fit_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="the output a exists"):
        api.merge(recipe("b"), "a")
    with pytest.raises(OutputError, match="does not exist"):
        api.merge(recipe("b"), "no/such/out")
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 9, 1))
    refused(recipe("a"), OutputError, "free")


def test_a_value_that_is_not_finite_names_tensor_and_model(here: Path) -> None:
    weights = folders.tuned(folders.weights(0), 1)
    weights["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    folders.write(here / "broken", weights)
    with pytest.raises(
        ArtifactError,
        match=r"broken holds a value that is not finite in model\.layers\.1\.mlp\.up_proj\.weight, at element 19",
    ):
        api.merge(recipe("a", "broken"), "out")
    assert not (here / "out").exists()
    with pytest.raises(ArtifactError, match="not finite"):
        diff("base", "broken", "v.safetensors")
    assert not (here / "v.safetensors").exists()


def test_a_result_out_of_range_is_refused(here: Path) -> None:
    with pytest.raises(ArtifactError, match="leaves the range of float16"):
        api.merge(recipe("a", method="task_arithmetic", options={"lambda": 1e7}, dtype="float16"), "out")


def test_unknown_keys_of_a_recipe_are_errors() -> None:
    with pytest.raises(UsageError) as caught:
        parse(
            {
                "methd": "ties",
                "models": [{"model": "a"}],
                "slices": [{"sources": [{"model": "a", "layer": [0, 1]}]}],
                "tokenizer": {"sorce": "union"},
            }
        )
    found = "\n".join(caught.value.problems)
    for word in (
        "'methd' (did you mean method?)",
        "'layer' in a source of slice 1 (did you mean layers?)",
        "'sorce' in tokenizer",
        "has no method",
    ):
        assert word in found


def test_damaged_folders_are_one_clear_error(here: Path) -> None:
    import shutil

    def spoiled(name: str, file: str, content: str) -> None:
        shutil.copytree(here / "b", here / name)
        (here / name / file).write_text(content)

    index = json.loads((here / "b" / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../a/model.safetensors"
    spoiled("outside", "model.safetensors.index.json", json.dumps(index))
    spoiled("list", "model.safetensors.index.json", "[]")
    for number, config in enumerate(("", "[]", '{"architectures": 5}', '{"text_config": 3}')):
        spoiled(f"config{number}", "config.json", config)
    refused(recipe("outside"), ModelError, '"../a/model.safetensors", not the name of a file in its folder')
    refused(recipe("list"), ModelError, "model.safetensors.index.json is damaged")
    for number in range(4):
        refused(recipe(f"config{number}"), ModelError, "config.json")
        refused(recipe("a", base=f"config{number}"), ModelError, "config.json")
    refused(recipe("b" * 250), ModelError, "there is no model")
    refused(recipe("a"), OutputError, "File name too long", out="o" * 256)
    refused(recipe("a\udcff"), UsageError, "is not valid Unicode")


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ({}, "holds no tensors"),
        ([1, 2], "is damaged"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "w.shape[0] is -1"),
        ({"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}}, "do not fit its shape"),
        ({"w": {"dtype": "F32", "shape": [1]}}, "is damaged"),
        ({"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, "unknown dtype F99"),
        (
            {"w": {"dtype": "F8_E5M2", "shape": [], "data_offsets": [0, 1]}},
            "holds tensors that can't be merged (1 as F8",
        ),
        ({"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "is damaged"),
    ],
)
def test_headers_that_lie_are_refused(here: Path, header: Any, sentence: str) -> None:
    text = json.dumps(header).encode()
    (here / "a" / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    refused(recipe("a", base="a"), ModelError, sentence)
