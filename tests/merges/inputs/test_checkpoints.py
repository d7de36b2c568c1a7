"""Model folders as people have them: with marks, pointers, pickles, quantisers, and heads that are tied or not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import shows

from merges import api
from merges.inputs.defaults import UNTIED
from merges.inputs.heads import is_head
from merges.recipes.plan import plan
from merges.recipes.recipe import Part, Recipe
from vectors.errors import SteerError

MARK = b"\xef\xbb\xbf"  # the byte order mark of UTF-8
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5\n"


def linear(*models: str) -> Recipe:
    return Recipe("linear", tuple(Part(model, model.rpartition("/")[2], {"weight": 1.0}) for model in models))


def refused(recipe: Recipe, *sentences: str) -> SteerError:
    with pytest.raises(SteerError) as caught:
        plan(recipe)
    for sentence in sentences:
        assert any(sentence in problem for problem in caught.value.problems), caught.value.problems
    return caught.value


def edited(folder: Path, **changes: Any) -> None:
    """Change config.json; a value of None takes the key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewritten(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@shows("checkpoints", "a byte order mark in any JSON file", "read")
def test_a_byte_order_mark_in_any_json_is_read(here: Path) -> None:
    api.merge(linear("a", "b"), "plain")
    for file in ("a/config.json", "b/config.json", "b/model.safetensors.index.json"):
        (here / file).write_bytes(MARK + (here / file).read_bytes())
    api.merge(linear("a", "b"), "marked")
    assert folders.same(here / "plain", here / "marked")
    folders.adapter(here / "lora")
    file = here / "lora" / "adapter_config.json"
    file.write_bytes(MARK + file.read_bytes())
    api.apply("base", "lora", "applied")


@shows("checkpoints", "adapter_config.json cut off, a list, or null", "refused as damaged")
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"peft_type": "LORA", "r": 2,', "adapter_config.json is damaged"),
        ("[]", "adapter_config.json is damaged: it holds a list, not an object"),
        ("null", "it holds null, not an object"),
        ('{"peft_type": 5}', "has the type 5, which is not among those that are applied"),
    ],
)
def test_damaged_settings_of_an_adapter_are_one_clear_error(here: Path, content: str, sentence: str) -> None:
    folders.adapter(here / "lora")
    (here / "lora" / "adapter_config.json").write_text(content)
    for base in ("base", None):
        error = refused(Recipe("task_arithmetic", (Part("lora", "lora"),), base), *([sentence] if base else []))
        assert len(error.problems) == 1


@shows("checkpoints", "an index without metadata; other files beside the weights", "merged")
def test_an_index_without_metadata_and_files_of_others_are_no_matter(here: Path) -> None:
    api.merge(linear("a", "b"), "plain")
    index = here / "b" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    for name in ("consolidated.safetensors", "adapter_config.json", "optimizer.pt", "training_args.bin"):
        (here / "b" / name).write_bytes(b"{}")
    api.merge(linear("a", "b"), "cluttered")
    assert folders.same(here / "plain", here / "cluttered")


@shows("checkpoints", "pointers of Git LFS", "refused as such")
def test_a_pointer_of_git_lfs_is_called_so(here: Path) -> None:
    (here / "a" / "model.safetensors").write_text(POINTER)
    error = refused(linear("a", "base"), "model.safetensors of a is a pointer of Git LFS, not weights")
    assert "lfs pull" in error.hint
    folders.adapter(here / "lora")
    (here / "lora" / "adapter_model.safetensors").write_text(POINTER)
    refused(Recipe("task_arithmetic", (Part("lora", "lora"),), "base"), "is a pointer of Git LFS")


class Bomb:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("exploded", "w"))


@shows("checkpoints", "weights as `.bin`, `.pt`", "refused unopened, with the way to convert them")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_refused_unopened_with_the_way_to_convert_them(here: Path, name: str) -> None:
    (here / "a" / "model.safetensors").unlink()
    torch.save(Bomb(), here / "a" / name)
    error = refused(linear("a", "base"), f"a has its weights in {name}, which are pickles")
    assert "save_pretrained" in error.hint
    assert "weights_only=True" in error.hint
    assert not (here / "exploded").exists()


@shows("checkpoints", "an adapter as `.bin`", "refused unopened, with the way to convert it")
def test_a_pickled_adapter_is_refused_unopened(here: Path) -> None:
    folders.adapter(here / "lora")
    (here / "lora" / "adapter_model.safetensors").unlink()
    torch.save(Bomb(), here / "lora" / "adapter_model.bin")
    error = refused(Recipe("task_arithmetic", (Part("lora", "lora"),), "base"), "adapter_model.bin, a pickle")
    assert "save_pretrained" in error.hint
    assert not (here / "exploded").exists()


@shows(
    "checkpoints",
    "quantised (bitsandbytes, GPTQ, AWQ, FP8, compressed-tensors and others), or cast to 8 bits",
    "refused, naming the quantiser",
)
@pytest.mark.parametrize(
    ("settings", "make", "said"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            lambda w: {"": w.to(torch.uint8).reshape(-1, 1), ".absmax": w.new_ones(2)},
            "bitsandbytes, 4 bits",
        ),
        (
            {"quant_method": "gptq", "bits": 4},
            lambda w: {".qweight": w.to(torch.int32), ".scales": w, ".g_idx": torch.zeros(2, dtype=torch.int32)},
            "gptq, 4 bits",
        ),
        (
            {"quant_method": "fp8"},
            lambda w: {"": w.to(torch.float8_e4m3fn), "_scale_inv": w.new_ones(1)},
            "fp8",
        ),
        (
            {"quant_method": "compressed-tensors"},
            lambda w: {"_packed": w.to(torch.int32), "_scale": w},
            "compressed-tensors",
        ),
        (None, lambda w: {"": w.to(torch.float8_e4m3fn)}, "as F8_E4M3; the first is model.layers.0.mlp.up_proj.weight"),
        ({"quant_method": "quip"}, lambda w: {".codes": w.to(torch.int64)}, "quip"),
        (None, lambda w: {"": w.to(torch.int8)}, "as I8; the first is model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_quantised_weights_are_one_sentence_that_names_the_quantiser(
    here: Path, settings: Any, make: Any, said: str
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in folders.read(here / "a").items():
        if name.endswith("_proj.weight"):
            tensors |= {name + suffix: made for suffix, made in make(tensor.float()).items()}
        else:
            tensors[name] = tensor
    rewritten(here / "a", tensors)
    edited(here / "a", quantization_config=settings)
    for recipe in (
        linear("a", "base"),
        Recipe("ties", (Part("a", "a"),), "base"),
        Recipe("ties", (Part("b", "b"),), "a"),
    ):
        error = refused(recipe, said)
        assert len(error.problems) == 1
    with pytest.raises(SteerError, match=r"quantised|can't be merged"):
        api.diff("base", "a", "v.safetensors")


def test_buffers_of_integers_and_odd_names_are_no_quantiser(here: Path) -> None:
    extra = {
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "model.position_ids": torch.arange(4).reshape(1, 4),
        "model.layers.0.layer_scales": torch.ones(8, dtype=torch.bfloat16),
    }
    for name in ("base", "a"):
        rewritten(here / name, folders.read(here / name) | extra)
    api.merge(linear("base", "a"), "out")
    assert extra.keys() <= folders.read(here / "out").keys()


@shows("checkpoints", "plain weights with a `quantization_config`", "merged, the result has none; said")
def test_plain_weights_beside_the_name_of_a_quantiser_are_merged_and_the_name_is_left_out(here: Path) -> None:
    edited(here / "base", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    recipe = Recipe("task_arithmetic", (Part("a", "a"),), "base")
    assert any("names a quantiser (bitsandbytes, 4 bits)" in note for note in plan(recipe).notes)
    api.merge(recipe, "out")
    assert "quantization_config" not in json.loads((here / "out" / "config.json").read_text())


@shows("checkpoints", "float64", "merged as float32")
@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_float64_is_merged_as_float32(here: Path, method: str) -> None:
    base, tuned = folders.read(here / "base"), folders.read(here / "a")
    rewritten(here / "a", {n: t.double() if n.endswith("norm.weight") else t for n, t in tuned.items()})
    parts = (Part("a", "a"), *([Part("b", "b")] if method == "slerp" else []))
    options = {"t": 0.5} if method == "slerp" else {}
    made = Recipe(method, parts, "base" if method == "ties" else None, options, dtype="float32")
    api.merge(made, "out")
    rewritten(here / "a", tuned)
    api.merge(made, "same")
    out, same = folders.read(here / "out"), folders.read(here / "same")
    assert all(torch.equal(out[name], same[name]) for name in base)


def test_a_difference_of_float64_restores_its_float32(here: Path) -> None:
    tuned = {n: t.double() + 1e-12 for n, t in folders.read(here / "a").items()}
    rewritten(here / "a", tuned)
    api.diff("base", "a", "v.safetensors")
    api.apply("base", "v.safetensors", "out", dtype="float32")
    for name, tensor in folders.read(here / "out").items():
        np.testing.assert_array_equal(tensor, tuned[name].float())


def test_types_that_need_no_import_are_not_tied_by_transformers_either() -> None:
    from transformers import CONFIG_MAPPING

    assert not [kind for kind in sorted(UNTIED) if CONFIG_MAPPING[kind]().tie_word_embeddings]


def test_plain_models_and_adapters_are_checked_and_merged_without_torch_and_transformers(here: Path) -> None:
    folders.adapter(here / "lora")
    script = (
        "import sys; from merges.recipes.plan import plan; from merges.recipes.recipe import Part, Recipe; "
        "plan(Recipe('ties', (Part('a', 'a'), Part('lora', 'lora')), 'base')); "
        "from merges.api import merge; merge(Recipe('ties', (Part('a', 'a'), Part('b', 'b')), 'base'), 'out'); "
        "sys.exit(' '.join({'torch', 'transformers', 'peft'} & set(sys.modules)) or 0)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_model_of_another_shape_is_refused_in_a_few_lines(here: Path) -> None:
    folders.write(here / "wide", folders.weights(0, hidden=16, layers=3))
    for recipe in (linear("base", "wide"), Recipe("ties", (Part("wide", "wide"),), "base")):
        error = refused(recipe, "more of this kind")
        assert len(error.problems) < 6
        assert "vocabular" not in error.hint
    with pytest.raises(SteerError) as caught:
        api.diff("base", "wide", "v.safetensors")
    assert len(caught.value.problems) < 6
    folders.write(here / "other", {n.replace("model.", "net."): t for n, t in folders.weights(0).items()})
    assert "vocabular" not in refused(linear("base", "other"), "lacks").hint


KINDS = {"gemma2": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}


@shows("checkpoints", "a tied head that a file stores too", "merged as the embedding")
@shows("checkpoints", "a stored head that differs from the embedding it should be", "refused")
@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_that_one_model_stores_too_is_the_embedding(kind: str, here: Path) -> None:
    pico.build(kind).save_pretrained(here / "first")
    tuned = pico.build(kind, seed=1)
    tuned.save_pretrained(here / "second")
    for name in ("first", "second"):  # as on the hub, where the default of the class says it
        edited(here / name, tie_word_embeddings=None)
    api.merge(linear("first", "second"), "plain")
    stored = load_file(here / "second" / "model.safetensors")
    rewritten(here / "second", stored | {"lm_head.weight": stored[KINDS[kind]].clone()})
    api.merge(linear("first", "second"), "out")
    assert folders.same(here / "plain", here / "out")
    api.diff("first", "second", "v.safetensors")
    rewritten(here / "second", stored | {"lm_head.weight": stored[KINDS[kind]] + 1})
    error = refused(linear("first", "second"), f"stores lm_head.weight, which differs from {KINDS[kind]}")
    assert "tie_word_embeddings" in error.hint


@shows("checkpoints", "an untied fine-tune of a tied base", "its head against the embedding; the result is untied")
def test_an_untied_fine_tune_of_a_tied_base_keeps_a_head_of_its_own(here: Path) -> None:
    tied = {name: tensor for name, tensor in folders.read(here / "base").items() if not is_head(name)}
    shutil.copytree(here / "base", here / "tied")
    rewritten(here / "tied", tied)
    edited(here / "tied", tie_word_embeddings=True)
    edited(here / "a", tie_word_embeddings=False)
    tuned, embedding = folders.read(here / "a"), tied["model.embed_tokens.weight"].float()

    api.merge(Recipe("task_arithmetic", (Part("a", "a", {"weight": 0.5}),), "tied", dtype="float32"), "half")
    head = folders.read(here / "half")["lm_head.weight"]
    torch.testing.assert_close(head, embedding + 0.5 * (tuned["lm_head.weight"].float() - embedding))
    assert json.loads((here / "half" / "config.json").read_text())["tie_word_embeddings"] is False

    api.diff("tied", "a", "v.safetensors")
    api.apply("tied", "v.safetensors", "restored")
    assert folders.same(here / "restored", here / "a")

    api.merge(linear("tied", "a"), "mean")
    expected = (embedding + tuned["lm_head.weight"].float()) / 2
    torch.testing.assert_close(folders.read(here / "mean")["lm_head.weight"].float(), expected, rtol=1e-2, atol=1e-2)
