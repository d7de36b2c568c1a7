"""Vision-language and multi-token-prediction models: names of both generations, and layers of the decoder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folders
import pytest
import torch
from support import shows

from merges import api
from merges.inputs.decoder import decoder, other_stacks, text_settings
from merges.outputs import adapter
from merges.recipes.document import parse
from merges.recipes.plan import plan
from merges.recipes.recipe import Part, Recipe, Slice, SliceSource
from merges.recipes.stacked_config import stacked_config
from vectors.errors import ModelError, SteerError

SIZES = {
    "num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 40, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `base` and `tuned`: Gemma 3 with four decoder layers and six vision layers, named as on the hub."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    place = tmp_path_factory.mktemp("gemma")
    config = Gemma3Config(
        text_config=SIZES
        | {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 8,
        },
        mm_tokens_per_image=4, image_token_index=5, boi_token_index=6, eoi_token_index=7,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    model.save_pretrained(place / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(place / "tuned")
    return place


def in_memory(name: str) -> str:
    """The name that transformers has had in memory since 4.52, which some trainers save."""
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return "model." + name if name.startswith(("vision_tower.", "multi_modal_projector.")) else name


def of_new_names(gemma: Path, out: Path) -> Path:
    """A copy of `tuned` under the names in memory."""
    tensors = {in_memory(name): tensor for name, tensor in folders.read(gemma / "tuned").items()}
    return folders.write(out, tensors, config=json.loads((gemma / "tuned" / "config.json").read_text()))


@shows("checkpoints", "parameter names of two generations of transformers", "matched by transformers' tables")
def test_names_of_both_generations_are_one_model(gemma: Path, tmp_path: Path) -> None:
    renamed = of_new_names(gemma, tmp_path / "renamed")
    assert folders.read(renamed).keys() != folders.read(gemma / "tuned").keys()
    for other, out in ((gemma / "tuned", "plain"), (renamed, "mixed")):
        part = Part(str(other), "tuned", {"weight": 0.5})
        api.merge(Recipe("task_arithmetic", (part,), str(gemma / "base")), tmp_path / out)
    assert folders.same(tmp_path / "plain", tmp_path / "mixed")
    vector = api.diff(str(gemma / "base"), str(renamed), tmp_path / "vector.safetensors")
    assert set(vector.parameters) == set(folders.read(gemma / "base"))


@shows("adapters", "LoRA on a vision-language model, convolutions too", "applied")
def test_an_adapter_for_the_names_in_memory_is_put_on_names_of_files(gemma: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(gemma / "base")
    targets = r".*language_model.*\.(q_proj|down_proj)|.*vision.*layers\.5.*fc1|.*patch_embedding"  # a convolution too
    config = peft.LoraConfig(r=2, target_modules=targets)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "lora")
    adapted.merge_and_unload().save_pretrained(tmp_path / "expected")
    api.apply(str(gemma / "base"), str(tmp_path / "lora"), tmp_path / "out")
    actual, expected = folders.read(tmp_path / "out"), folders.read(tmp_path / "expected")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor)


def test_an_adapter_of_a_tower_is_not_put_on_the_decoder(here: Path) -> None:
    tensors = {n.removeprefix("model."): t for n, t in folders.weights(0).items() if n.startswith("model.layers")}
    folders.write(here / "text", tensors)
    module = "base_model.model.audio_tower.layers.1.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.ones(8, 2)}
    folders.adapter(here / "lora", config={"target_modules": ["q_proj"]}, extra=factors)
    with pytest.raises(SteerError, match=r"changes audio_tower.layers.1.self_attn.q_proj, which the base lacks"):
        api.apply("text", "lora", "out")


@shows("adapters", "`--to-lora` of a vision-language model", "written by the names that PEFT has")
def test_an_adapter_of_a_difference_is_found_by_peft_in_every_tower(gemma: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForImageTextToText

    adapter.from_models(str(gemma / "base"), str(gemma / "tuned"), tmp_path / "lora", 24)
    model = AutoModelForImageTextToText.from_pretrained(gemma / "base")
    peft.PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload().save_pretrained(tmp_path / "loaded")
    tuned, loaded = folders.read(gemma / "tuned"), folders.read(tmp_path / "loaded")
    matrices = [name for name in tuned if name.endswith(("q_proj.weight", "fc1.weight", "down_proj.weight"))]
    assert any("vision" in name for name in matrices)
    for name in matrices:
        torch.testing.assert_close(loaded[name], tuned[name], rtol=1e-3, atol=1e-5)


@shows("checkpoints", "slices of a vision-language model", "the decoder's layers are stacked, towers stay")
def test_slices_stack_the_decoder_and_leave_the_vision_tower(gemma: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model = str(gemma / "base")
    slices = [{"sources": [{"model": model, "layers": [0, 3]}]}, {"sources": [{"model": model, "layers": [1, 4]}]}]
    made = parse({"method": "passthrough", "models": [{"model": model}], "slices": slices})
    assert any("vision_tower" in note for note in plan(made).notes)
    api.merge(made, tmp_path / "out")
    base, out = folders.read(gemma / "base"), folders.read(tmp_path / "out")
    for new, old in enumerate([0, 1, 2, 1, 2, 3]):
        name = "language_model.model.layers.{}.self_attn.q_proj.weight"
        assert torch.equal(out[name.format(new)], base[name.format(old)])
    others = {name for name in base if "language_model.model.layers" not in name}
    assert others == {name for name in out if "language_model.model.layers" not in name}
    assert all(torch.equal(out[name], base[name]) for name in others)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 6
    assert config["vision_config"]["num_hidden_layers"] == 6
    before = ["sliding_attention", "full_attention"] * 2
    assert config["text_config"]["layer_types"] == [before[layer] for layer in (0, 1, 2, 1, 2, 3)]
    _, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@shows(
    "checkpoints", "gradients over a vision-language model", "over the decoder's layers; towers take the first value"
)
def test_a_gradient_runs_over_the_layers_of_the_decoder(gemma: Path, tmp_path: Path) -> None:
    part = Part(str(gemma / "tuned"), "tuned", {"weight": [0.0, 1.0]})
    api.merge(Recipe("task_arithmetic", (part,), str(gemma / "base"), dtype="float32"), tmp_path / "out")
    base, tuned, out = (folders.read(p) for p in (gemma / "base", gemma / "tuned", tmp_path / "out"))
    for layer in range(4):
        name = f"language_model.model.layers.{layer}.mlp.up_proj.weight"
        torch.testing.assert_close(out[name], base[name] + layer / 3 * (tuned[name] - base[name]))
    name = next(name for name in base if "vision" in name and name.endswith("layers.5.mlp.fc1.weight"))
    torch.testing.assert_close(out[name], base[name])


@pytest.mark.parametrize(
    ("config", "names", "prefix", "depth", "others"),
    [
        ({"n_layer": 2}, ["wte.weight", "h.0.mlp.weight", "h.1.mlp.weight"], "h.", 2, []),
        (  # the layers of multi-token prediction follow those of the decoder
            {"num_hidden_layers": 2},
            ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.gate.weight" for i in range(3))],
            "model.layers.", 2, ["model.layers.2"],
        ),
        (
            {"num_hidden_layers": 2},
            ["model.embed_tokens.weight", "model.layers.1.x.weight", "mtp.layers.0.x.weight", "mtp.layers.7.x.weight"],
            "model.layers.", 2, ["mtp.layers"],
        ),
        (
            {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 9}},
            ["visual.blocks.8.norm.weight", "model.layers.1.x.weight", "model.embed_tokens.weight"],
            "model.layers.", 2, ["visual.blocks"],
        ),
        (
            {"thinker_config": {"text_config": {"num_hidden_layers": 1}}},
            ["thinker.model.layers.0.x.weight", "thinker.model.embed_tokens.weight", "talker.model.layers.5.x.weight"],
            "thinker.model.layers.", 1, ["talker.model.layers"],
        ),
        ({}, ["model.layers.0.mlp.experts.7.w1.weight", "model.embed_tokens.weight"], "model.layers.", 1, []),
        ({}, ["model.norm.weight"], "", 0, []),
        (
            {"num_layers": 2}, [f"{stack}.block.{i}.x.weight" for stack in ("encoder", "decoder") for i in (0, 1)],
            "encoder.block.", 2, [],
        ),
    ],
)  # fmt: skip
def test_the_decoder_is_found_among_other_layers(
    config: dict[str, Any], names: list[str], prefix: str, depth: int, others: list[str]
) -> None:
    found = decoder(config, names)
    assert (found.prefix, found.depth) == (prefix, depth)
    assert other_stacks(found, names) == others


def test_an_encoder_and_a_decoder_have_gradients_and_no_slices(here: Path) -> None:
    tensors = {}
    for stack in ("encoder", "decoder"):
        layers = {n: t for n, t in folders.weights(0).items() if "layers" in n}
        tensors |= {name.replace("model.", f"model.{stack}."): tensor for name, tensor in layers.items()}
    folders.write(here / "both", tensors)
    folders.write(here / "tuned", folders.tuned(tensors, 1))
    part = Part("tuned", "tuned", {"weight": [0.0, 1.0]})
    api.merge(Recipe("task_arithmetic", (part,), "both"), "out")
    out, tuned = folders.read(here / "out"), folders.read(here / "tuned")
    for stack in ("encoder", "decoder"):
        name = f"model.{stack}.layers.{{}}.mlp.up_proj.weight"
        assert torch.equal(out[name.format(0)], tensors[name.format(0)])
        assert torch.equal(out[name.format(2)], tuned[name.format(2)])
    slices = [{"sources": [{"model": "both", "layers": [0, 2]}]}]
    with pytest.raises(ModelError, match="both has several stacks of layers"):
        plan(parse({"method": "passthrough", "models": [{"model": "both"}], "slices": slices}))


@shows("checkpoints", "layers of multi-token prediction", "merged as they are, and follow the last layer of a stack")
def test_layers_of_multi_token_prediction_keep_their_distance_from_the_end(tmp_path: Path) -> None:
    tensors = folders.weights(0, layers=4)
    folders.write(tmp_path / "m", tensors, config={"num_hidden_layers": 3, "num_nextn_predict_layers": 1})
    model = str(tmp_path / "m")
    slices = [{"sources": [{"model": model, "layers": [0, 2]}]}, {"sources": [{"model": model, "layers": [0, 3]}]}]
    api.merge(parse({"method": "passthrough", "models": [{"model": model}], "slices": slices}), tmp_path / "out")
    out = folders.read(tmp_path / "out")
    for new, old in enumerate([0, 1, 0, 1, 2, 3]):  # the last is that of multi-token prediction
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(out[name.format(new)], tensors[name.format(old)])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (5, 1)
    slices = [{"sources": [{"model": model, "layers": [0, 4]}]}]
    with pytest.raises(ModelError, match=r"layers up to 3 of .*, whose decoder has 3"):
        plan(parse({"method": "passthrough", "models": [{"model": model}], "slices": slices}))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"layer_types": ["a", "b", "c", "d"]}, {"layer_types": ["a", "b", "b", "d"]}),
        ({"layers_block_type": ["a", "b", "c", "d"]}, {"layers_block_type": ["a", "b", "b", "d"]}),
        ({"mlp_only_layers": [1, 2]}, {"mlp_only_layers": [1, 2]}),
        ({"mlp_only_layers": [3]}, {"mlp_only_layers": [3]}),
        ({"eos_token_id": [1, 2, 3, 4]}, {"eos_token_id": [1, 2, 3, 4]}),
        ({"full_attention_interval": 4}, {"full_attention_interval": 4}),
        (
            {"sliding_window_pattern": 2, "sliding_window": 8},
            {"layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "full", "full")]},
        ),
        ({"sliding_window_pattern": 2, "sliding_window": None}, {}),
        ({"max_window_layers": 4, "use_sliding_window": False}, {"max_window_layers": 4}),
        ({"first_k_dense_replace": 1}, {"first_k_dense_replace": 1}),
    ],
)
def test_what_a_configuration_says_of_each_layer_follows_the_layers(
    config: dict[str, Any], expected: dict[str, Any]
) -> None:
    slices = [Slice((SliceSource("m", layers),)) for layers in ((0, 2), (1, 2), (3, 4))]
    changed, problems = stacked_config({"num_hidden_layers": 4} | config, slices, "m")
    assert not problems
    assert changed | expected == changed
    nested, _ = stacked_config({"text_config": {"num_hidden_layers": 4} | config}, slices, "m")
    assert nested["text_config"] | expected == nested["text_config"]


@shows(
    "checkpoints",
    "a stack in which a layer would become one of another kind (dense, experts)",
    "refused with the setting",
)
@pytest.mark.parametrize(
    "config",
    [{"first_k_dense_replace": 1}, {"decoder_sparse_step": 2, "num_experts": 8}, {"no_rope_layer_interval": 4}],
)
def test_a_layer_that_would_become_one_of_another_kind_is_refused(config: dict[str, Any]) -> None:
    slices = [Slice((SliceSource("m", layers),)) for layers in ((0, 4), (0, 1), (0, 1), (3, 4))]
    key = next(iter(config))
    assert any(key in problem for problem in stacked_config({"num_hidden_layers": 4} | config, slices, "m")[1])


def test_text_settings_follow_nested_configurations() -> None:
    inner = {"num_hidden_layers": 3}
    for config in (inner, {"text_config": inner}, {"llm_config": inner}, {"thinker_config": {"text_config": inner}}):
        assert text_settings(config) is inner
    assert text_settings({"vision_config": {"num_hidden_layers": 9}, "n_layer": 2})["n_layer"] == 2
