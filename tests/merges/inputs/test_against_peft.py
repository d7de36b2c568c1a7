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
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import shows

from merges import api
from merges.inputs.adapters import settings
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


# What the adapter has, a base of BASES, and what it is trained with beside r=4 and lora_alpha=6.
MERGED_BY_BOTH: list[tuple[str, str, dict[str, Any]]] = [
    ("matrices of linear layers", "llama", {"target_modules": ["q_proj", "down_proj"]}),
    ("all linear layers, rsLoRA", "llama", {"target_modules": "all-linear", "use_rslora": True}),
    (
        "rank and alpha patterns", "llama",
        {
            "target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 3},
            "alpha_pattern": {"1.*q_proj": 5},
        },
    ),
    (
        "layers_to_transform, layers_pattern", "llama",
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    (
        "exclude_modules", "llama",
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    ("embedding and untied head", "llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    (
        "modules_to_save: embedding, untied head, norm", "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    ),
    ("DoRA, also of the embedding", "llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    ("trainable tokens", "llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]}),
    (
        "trainable tokens of embedding and head", "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [4, 7]}},
    ),
    ("trainable tokens of a tied model", "tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]}),
    (
        "modules_to_save of a tied model, with ensure_weight_tying", "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    ("initialisation orthogonal", "llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    ("initialisation gaussian", "llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    ("initialisation MiCA", "llama", {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    ("VeLoRA", "llama", {"target_modules": ["q_proj"], "velora_config": {"num_groups": 4}}),
    ("lora_bias", "biased", {"target_modules": ["q_proj"], "lora_bias": True}),
    ("bias: all", "biased", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    ("bias: lora_only", "biased", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    ("Conv1D layers beside linear ones", "gpt2", {"target_modules": ["attn.c_attn", "attn.c_proj", "lm_head"]}),
    ("Conv1D layers and an embedding", "gpt2", {"target_modules": ["c_fc", "wte"], "fan_in_fan_out": True}),
    ("DoRA of Conv1D layers", "gpt2", {"target_modules": ["attn.c_proj"], "use_dora": True}),
    ("square Conv1D layers", "square", {"target_modules": ["c_proj", "c_fc"]}),
    ("target_parameters: a matrix", "llama", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    (
        "target_parameters: fused experts", "experts",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    (
        "target_parameters: one of two", "experts",
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("what", "name", "config"), MERGED_BY_BOTH, ids=[entry[0] for entry in MERGED_BY_BOTH])
def test_lora_gives_what_peft_gives(what: str, name: str, config: dict[str, Any], bases: Any, tmp_path: Path) -> None:
    folder, model = bases(name)
    if "velora_config" in config:
        config = config | {"velora_config": peft.VeloraConfig(**config["velora_config"])}
    trained(copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=6, **config), tmp_path / "adapter")
    require_equal(folder, model, tmp_path / "adapter", tmp_path)


def test_an_adapter_initialised_by_eva_gives_what_peft_gives(bases: Any, tmp_path: Path) -> None:
    folder, model = bases("llama")
    trained(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "eva"}))
    require_equal(folder, model, tmp_path / "adapter", tmp_path)


@shows("adapters", "LoRA of experts one by one (transformers 4), where they are fused in memory", "applied")
def test_factors_of_experts_one_by_one_give_what_peft_gives(bases: Any, tmp_path: Path) -> None:
    folder, model = bases("experts")
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in folders.read(folder).items():
        if ".experts." in name:
            rows, columns = tensor.shape
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = 0.1 * torch.randn(4, columns, generator=draw)
            tensors[f"{module}.lora_B.weight"] = 0.1 * torch.randn(rows, 4, generator=draw)
    assert tensors
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(values))
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


# What the adapter has, a base, what it is trained with, and what names it in the refusal.
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("PiSSA", "llama", {"init_lora_weights": "pissa"}, "PiSSA"),
    ("PiSSA with iterations", "llama", {"init_lora_weights": "pissa_niter_4"}, "PiSSA"),
    ("OLoRA", "llama", {"init_lora_weights": "olora"}, "OLoRA"),
    ("activated LoRA", "llama", {"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ("layer replication", "llama", {"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ("the head of a tied model", "tied", {"target_modules": ["lm_head"]}, "lm_head apart"),
    ("the embedding of a tied model", "tied", {"target_modules": ["embed_tokens"]}, "embed_tokens apart"),
    (
        "the embedding of a tied model, with ensure_weight_tying", "tied",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "apart",
    ),
    (
        "modules_to_save: embedding and head of a tied model", "tied",
        {"modules_to_save": ["embed_tokens", "lm_head"]}, "lm_head, model.embed_tokens apart",
    ),
    (
        "modules_to_save: the embedding alone of a tied model", "tied",
        {"modules_to_save": ["embed_tokens"]}, "model.embed_tokens apart",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("what", "name", "config", "said"), REFUSED, ids=[entry[0] for entry in REFUSED])
def test_lora_that_is_no_plain_delta_is_refused_by_name(
    what: str, name: str, config: dict[str, Any], said: str, bases: Any, tmp_path: Path
) -> None:
    folder, model = bases(name)
    trained(model, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | config), tmp_path / "adapter")
    with pytest.raises(SteerError, match=said):
        api.apply(str(folder), str(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", sorted(settings.REFUSED))
def test_every_refused_field_is_named_with_its_reason(field: str) -> None:
    problems = settings.problems_of_settings({"peft_type": "LORA", "r": 4, "lora_alpha": 8, field: {"any": 1}})
    assert problems == [f"has {field}: {{'any': 1}}: {settings.REFUSED[field]}"]


@pytest.mark.parametrize("start", sorted(settings.OF_BASE))
def test_every_initialisation_that_changes_the_base_is_named(start: str) -> None:
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": start}
    problems = settings.problems_of_settings(values)
    assert len(problems) == 1
    assert settings.OF_BASE[start] in problems[0]


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
        ("r", 10**400, "which is not of the right type"),
        ("lora_alpha", 10**400, "which is not of the right type"),
        ("lora_alpha", float("nan"), "which is not of the right type"),
        ("alpha_pattern", {"q_proj": 10**400}, "which is not of the right type"),
        ("r", 8, "factors of rank 4 for model.layers.0.self_attn.q_proj, where its settings say 8"),
        ("rank_pattern", {"(": 4}, "rank_pattern"),
        ("lora_alpha", None, "has no lora_alpha"),
        ("init_lora_weights", "corda", "CorDA takes a part of the base away"),
        ("init_lora_weights", "loftq", "LoftQ takes a part of the base away"),
        ("init_lora_weights", "lora_ga", "LoRA-GA takes a part of the base away"),
        ("init_lora_weights", "eva", None),
        ("velora_config", {"num_groups": 4}, None),
        ("arrow_config", {"arrow_top_k": 3}, "arrow_config"),
        ("use_bdlora", {"nblocks": 2}, "use_bdlora"),
        ("monteclora_config", {"n": 2}, "monteclora_config"),
        ("kasa_config", {"beta": 1}, "kasa_config"),
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


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(KNOWN)) | st.text(max_size=6), VALUES, max_size=6))
def test_settings_of_any_kind_are_understood_or_refused(values: dict[str, Any]) -> None:
    values = {"r": 4, "lora_alpha": 8} | values
    problems = settings.problems_of_settings(values)
    assert all(isinstance(problem, str) for problem in problems)
    if not problems:
        made = settings.Settings("LORA", values)
        assert isinstance(made.selects("model.layers.0.q_proj"), bool)
        if values.get("peft_type", "LORA") == "LORA":
            assert made.scale("model.layers.0.q_proj") == made.scale("model.layers.0.q_proj")


@shows("adapters", "a tensor or a setting that is not known here", "refused by its name")
def test_a_tensor_that_is_not_understood_is_named(bases: Any, tmp_path: Path) -> None:
    folder, model = bases("llama")
    trained(model, peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    strange = "base_model.model.model.layers.0.self_attn.q_proj.lora_gate.weight"
    save_file({**load_file(file), strange: torch.ones(4)}, file)
    with pytest.raises(SteerError, match="lora_gate"):
        api.apply(str(folder), str(tmp_path / "adapter"), tmp_path / "out")


@shows("adapters", "modules_to_save whose vocabulary grew", "refused with both sizes")
def test_a_vocabulary_that_grew_is_refused_with_both_sizes(bases: Any, tmp_path: Path) -> None:
    folder, model = bases("llama")
    model.resize_token_embeddings(67, mean_resizing=False)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    trained(model, config, tmp_path / "adapter")
    with pytest.raises(SteerError) as caught:
        api.apply(str(folder), str(tmp_path / "adapter"), tmp_path / "out")
    assert any("with 67 rows, where the base has 64" in problem for problem in caught.value.problems)
    assert "resize the base's embeddings to 67 rows" in caught.value.hint


@shows("adapters", "names with `_orig_mod`, `_fsdp_wrapped_module`", "applied")
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
