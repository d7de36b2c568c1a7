"""Adapters against PEFT itself: what it merges, we merge to the same weights, or refuse by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folders
import pico
import pytest
import torch
from safetensors.torch import load_file, save_file

from merges import api
from merges.inputs.adapters.settings import APPLIED_TYPES, KNOWN
from merges.recipes.recipe import Part, Recipe
from vectors.errors import SteerError

peft = pytest.importorskip("peft")

SMALL = {"num_hidden_layers": 2, "vocab_size": 64}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "biased": ("qwen2", {}),
    "gpt2": ("gpt2", {"n_layer": 2, "tie_word_embeddings": False}),
    "square": ("gpt2", {"n_layer": 2, "n_inner": pico.HIDDEN, "tie_word_embeddings": False}),
    "experts": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A base's folder and its model in memory, by its name in BASES; made once."""
    made: dict[str, tuple[Path, Any]] = {}
    place = tmp_path_factory.mktemp("bases")

    def base(name: str) -> tuple[Path, Any]:
        if name not in made:
            kind, changes = BASES[name]
            model = pico.build(kind, **SMALL | changes)
            model.save_pretrained(place / name)
            made[name] = place / name, model
        folder, model = made[name]
        return folder, copy.deepcopy(model)

    return base


def trained(model: Any, config: Any, folder: Path, **saving: Any) -> Any:
    """An adapter in `folder` with random numbers wherever PEFT would train."""
    torch.manual_seed(5)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder, **saving)
    return adapted


def require_equal(base: Path, model: Any, adapter: Path, out: Path) -> None:
    """Both ways of applying the adapter give what PEFT gives when it loads it and merges it."""
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out / "expected")
    expected, before = folders.read(out / "expected"), folders.read(base)
    api.apply(str(base), str(adapter), out / "applied", dtype="float32")
    api.merge(Recipe("linear", (Part(f"{base}+{adapter}", "x"),), dtype="float32"), out / "on")
    for folder in ("applied", "on"):
        actual = folders.read(out / folder)
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{folder}: {name}")
    assert any(not torch.equal(expected[name], before[name]) for name in expected)


MERGED_BY_BOTH: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    (
        "llama",
        {
            "target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 3},
            "alpha_pattern": {"1.*q_proj": 5},
        },
    ),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]}),
    ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [4, 7]}}),
    ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    ("llama", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]}),
    ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("biased", {"target_modules": ["q_proj"], "lora_bias": True}),
    ("biased", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    ("biased", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    ("gpt2", {"target_modules": ["attn.c_attn", "attn.c_proj", "lm_head"]}),
    ("gpt2", {"target_modules": ["c_fc", "wte"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["attn.c_proj"], "use_dora": True}),
    ("square", {"target_modules": ["c_proj", "c_fc"]}),
    (
        "experts",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    ("experts", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config"), MERGED_BY_BOTH, ids=lambda value: str(value).replace(" ", ""))
def test_lora_gives_what_peft_gives(name: str, config: dict[str, Any], bases: Any, tmp_path: Path) -> None:
    folder, model = bases(name)
    trained(copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=6, **config), tmp_path / "adapter")
    require_equal(folder, model, tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])),
        ("biased", lambda: peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[])),
        ("gpt2", lambda: peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
        ("square", lambda: peft.IA3Config(target_modules=["c_fc", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
        ("llama", lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"])),
        ("llama", lambda: peft.TrainableTokensConfig(token_indices=[1, 5], target_modules=["embed_tokens"])),
        ("tied", lambda: peft.TrainableTokensConfig(token_indices=[1, 5], target_modules=["embed_tokens"])),
    ],
)
def test_other_types_give_what_peft_gives(name: str, config: Any, bases: Any, tmp_path: Path) -> None:
    folder, model = bases(name)
    trained(copy.deepcopy(model), config(), tmp_path / "adapter")
    require_equal(folder, model, tmp_path / "adapter", tmp_path)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"init_lora_weights": "pissa"}, "PiSSA"),
    ("llama", {"init_lora_weights": "pissa_niter_4"}, "PiSSA"),
    ("llama", {"init_lora_weights": "olora"}, "OLoRA"),
    ("llama", {"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ("llama", {"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ("tied", {"target_modules": ["lm_head"]}, "lm_head apart"),
    ("tied", {"target_modules": ["embed_tokens"]}, "embed_tokens apart"),
    ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}, "lm_head, model.embed_tokens apart"),
]


@pytest.mark.parametrize(("name", "config", "said"), REFUSED)
def test_lora_that_is_no_plain_delta_is_refused_by_name(
    name: str, config: dict[str, Any], said: str, bases: Any, tmp_path: Path
) -> None:
    folder, model = bases(name)
    trained(model, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | config), tmp_path / "adapter")
    with pytest.raises(SteerError, match=said):
        api.apply(str(folder), str(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", sorted(kind.value for kind in peft.PeftType))
def test_every_type_of_peft_is_applied_or_refused_by_its_name(kind: str, bases: Any, tmp_path: Path) -> None:
    if kind in APPLIED_TYPES:
        return  # tested against PEFT above
    folder, _ = bases("llama")
    (tmp_path / "adapter").mkdir()
    try:
        values = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind]().to_dict()
    except Exception:  # a type whose settings have no defaults, or that needs another package
        values = {"peft_type": kind}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(values, default=list))
    save_file({"base_model.model.x": torch.ones(2)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(SteerError, match=rf"has the type {kind}, which is not among those that are applied"):
        api.apply(str(folder), str(tmp_path / "adapter"), tmp_path / "out")


def test_every_field_of_the_installed_peft_has_a_place_in_the_table() -> None:
    for config in (peft.LoraConfig, peft.IA3Config, peft.LNTuningConfig, peft.TrainableTokensConfig):
        assert set(config().to_dict()) <= KNOWN


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("a_field_of_2030", {"depth": 2}, "a_field_of_2030: {'depth': 2}, a setting that is not known"),
        ("a_field_of_2030", None, None),
        ("use_qalora", True, "use_qalora: True: its factors act on pooled inputs"),
        ("megatron_config", {"tp": 2}, "megatron_config"),
        ("r", "four", "r: 'four', which is not of the right type"),
        ("r", 8, "factors of rank 4 for model.layers.0.self_attn.q_proj, where its settings say 8"),
        ("rank_pattern", {"(": 4}, "rank_pattern"),
        ("lora_alpha", None, "has no lora_alpha"),
        ("init_lora_weights", "a_method_of_2030", "init_lora_weights: 'a_method_of_2030', which is not known"),
        ("layers_to_transform", [1], "holds factors of model.layers.0.self_attn.q_proj, which its settings leave out"),
        ("target_modules", ["k_proj"], "holds factors of model.layers.0.self_attn.q_proj, which its settings leave"),
    ],
)
def test_a_field_is_applied_or_named(field: str, value: Any, said: str | None, bases: Any, tmp_path: Path) -> None:
    folder, model = bases("llama")
    trained(model, peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    if said is None:
        api.apply(str(folder), str(tmp_path / "adapter"), tmp_path / "out")
        return
    with pytest.raises(SteerError) as caught:
        api.apply(str(folder), str(tmp_path / "adapter"), tmp_path / "out")
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


def test_a_tensor_that_is_not_understood_is_named(bases: Any, tmp_path: Path) -> None:
    folder, model = bases("llama")
    trained(model, peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    strange = "base_model.model.model.layers.0.self_attn.q_proj.lora_gate.weight"
    save_file({**load_file(file), strange: torch.ones(4)}, file)
    with pytest.raises(SteerError, match="lora_gate"):
        api.apply(str(folder), str(tmp_path / "adapter"), tmp_path / "out")


def test_a_vocabulary_that_grew_is_refused_with_both_sizes(bases: Any, tmp_path: Path) -> None:
    folder, model = bases("llama")
    model.resize_token_embeddings(67, mean_resizing=False)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    trained(model, config, tmp_path / "adapter")
    with pytest.raises(SteerError) as caught:
        api.apply(str(folder), str(tmp_path / "adapter"), tmp_path / "out")
    assert any("with 67 rows, where the base has 64" in problem for problem in caught.value.problems)
    assert "resize the base's embeddings to 67 rows" in caught.value.hint


def test_names_that_wrappers_of_training_add_are_left_out(bases: Any, tmp_path: Path) -> None:
    folder, model = bases("llama")
    trained(model, peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    api.apply(str(folder), str(tmp_path / "adapter"), tmp_path / "plain")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    for old, new in (
        ("base_model.model.", "base_model.model._orig_mod."),
        ("self_attn", "_fsdp_wrapped_module.self_attn"),
    ):
        save_file({key.replace(old, new): tensor for key, tensor in load_file(file).items()}, file)
    api.apply(str(folder), str(tmp_path / "adapter"), tmp_path / "wrapped")
    assert folders.same(tmp_path / "plain", tmp_path / "wrapped")
