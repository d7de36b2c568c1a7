"""Settings that change what weights mean have to agree; which they are is a table in docs/merge.md, made from here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import folders
import pytest

from merges import api
from merges.recipes.agreement.fields import GROUPS, group_of
from merges.recipes.agreement.settings import compare, differences
from merges.recipes.document import parse
from merges.recipes.plan import plan
from vectors.errors import ModelError
from vectors.events import Event

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
# A field of each kind, its other value, and the model type that has it. Each is refused, with both values.
CHANGED: list[tuple[str, str, Any]] = [
    ("llama", "rope_theta", 500000.0),
    ("llama", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
    ("llama", "num_attention_heads", 4),
    ("llama", "num_key_value_heads", 1),
    ("llama", "head_dim", 8),
    ("llama", "hidden_act", "gelu"),
    ("llama", "rms_norm_eps", 0.1),
    ("llama", "attention_bias", True),
    ("mistral", "sliding_window", 64),
    ("qwen2", "use_sliding_window", True),
    ("qwen3", "layer_types", ["sliding_attention"] * 3),
    ("gemma2", "attn_logit_softcapping", 20.0),
    ("gemma2", "final_logit_softcapping", None),
    ("gemma2", "query_pre_attn_scalar", 64),
    ("gemma3_text", "rope_local_base_freq", 20000.0),
    ("granite", "embedding_multiplier", 12.0),
    ("granite", "logits_scaling", 8.0),
    ("granite", "residual_multiplier", 0.2),
    ("cohere", "logit_scale", 0.5),
    ("gpt2", "activation_function", "relu"),
    ("gpt2", "layer_norm_epsilon", 0.1),
    ("gpt_neox", "rotary_pct", 0.5),
    ("gpt_neox", "use_parallel_residual", False),
    ("mixtral", "num_experts_per_tok", 1),
    ("qwen3_moe", "norm_topk_prob", True),
    ("qwen2_moe", "decoder_sparse_step", 2),
    ("deepseek_v3", "routed_scaling_factor", 1.0),
    ("deepseek_v3", "n_group", 2),
]


def refused(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The names of the fields that have to agree and do not."""
    return [d.key for d in differences(ours, theirs) if d.known and group_of(d.key) is None]


@pytest.mark.parametrize(("kind", "field", "value"), CHANGED)
def test_a_setting_that_changes_what_weights_mean_is_a_difference(kind: str, field: str, value: Any) -> None:
    config = {"model_type": kind, "num_hidden_layers": 3}
    assert refused(config, config | {field: value}), field
    assert refused(config | {field: value}, config | {field: value}) == []


@pytest.mark.parametrize("kind", sorted({kind for kind, _, _ in CHANGED}))
def test_every_field_of_a_configuration_class_is_compared_unless_it_is_listed(kind: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    whole = CONFIG_MAPPING[kind]().to_dict()
    checked = 0
    for field in dataclasses.fields(CONFIG_MAPPING[kind]):
        value = whole.get(field.name)
        unused = field.name == "sliding_window" and not whole.get("use_sliding_window", True)
        if type(value) not in (int, float, bool) or unused or field.name in ("num_hidden_layers", "is_encoder_decoder"):
            continue
        other = not value if isinstance(value, bool) else value * 2 or 1
        given = differences(whole, whole | {field.name: other})
        if group_of(field.name) is None:
            checked += 1
            # A few make the class itself raise, or are derived from others; then the plain values are compared.
            assert any(field.name in d.key or d.key in ("layer_types", "rope_theta") for d in given), field.name
        else:
            assert all(group_of(d.key) is not None for d in given), field.name
    assert checked >= 5


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"rope_theta": 10000.0}, {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "linear", "factor": 2.0}},
        ),
        ({}, {"rms_norm_eps": 1e-6, "hidden_act": "silu", "mlp_bias": False, "num_key_value_heads": 32}),
        ({"torch_dtype": "float16"}, {"dtype": "bfloat16", "use_cache": False, "transformers_version": "5.0"}),
        ({"head_dim": None}, {"head_dim": 128}),
    ],
)
def test_an_absent_value_equals_its_default_and_an_older_spelling_the_newer(older: Any, newer: Any) -> None:
    assert differences({"model_type": "llama"} | older, {"model_type": "llama"} | newer) == []


@pytest.mark.parametrize("odd", ["linear", 5, [1, 2], True])
@pytest.mark.parametrize("kind", ["llama", "unheard-of"])
def test_settings_of_rope_that_are_none_differ_from_those_that_are(kind: str, odd: Any) -> None:
    plain = {"model_type": kind, "rope_theta": 10_000.0}
    for key in ("rope_parameters", "rope_scaling"):
        assert differences(plain, plain | {key: odd})
        assert differences(plain | {key: odd}, plain | {key: odd}) == []


def test_windows_that_are_not_used_may_differ() -> None:
    qwen = {"model_type": "qwen2", "use_sliding_window": False}
    assert refused(qwen | {"sliding_window": 131072}, qwen | {"sliding_window": None}) == []


def test_nested_configurations_and_those_of_unknown_models_are_compared_too() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 64}
    gemma = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 16}}
    other = gemma | {"text_config": text | {"sliding_window": 7, "comment": "x"}, "vision_config": {"patch_size": 7}}
    assert refused(gemma, other) == [
        "text_config.sliding_window",
        "vision_config.hidden_size",
        "vision_config.patch_size",
    ]
    ours = {"model_type": "ours", "auto_map": {"AutoConfig": "x.Y"}, "alpha": 1, "beta": None}
    assert refused(ours, ours | {"alpha": 2}) == ["alpha"]
    assert refused(ours, {"model_type": "ours", "alpha": 1}) == []


@pytest.fixture
def llamas(here: Path) -> Path:
    for seed, name in enumerate(("x", "y"), 7):
        folders.write(here / name, folders.weights(seed), config=HEADS)
    return here


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


LINEAR = {"method": "linear", "base": "x", "models": [{"model": "x"}, {"model": "y"}]}


def test_other_settings_are_refused_unless_they_are_allowed(llamas: Path) -> None:
    change(llamas / "y", rope_theta=1e6, hidden_act="gelu")
    with pytest.raises(ModelError) as caught:
        api.merge(parse(LINEAR), "out")
    assert list(caught.value.problems) == [
        "hidden_act is 'silu' in x, 'gelu' in y", "rope_theta is 10000.0 in x, 1000000.0 in y",
    ]  # fmt: skip
    assert "--allow-config" in caught.value.hint
    notes: list[str] = []

    def hear(event: Event) -> None:
        notes.append(event.message or "")

    for words in (("method", "base"), ("merge_method", "base_model")):
        document = {words[0]: "linear", words[1]: "x", "models": LINEAR["models"], "parameters": {"weight": 1}}
        allowed = document | {"allow_config": ["rope_theta", "hidden_act", "head_dim"]}
        plan(parse(allowed), on_event=hear)
    assert any("rope_theta is 10000.0 in x, 1000000.0 in y: merged as allowed" in note for note in notes)
    assert "no input differs in head_dim, which is allowed" in notes
    made = parse(allowed)
    assert parse(made.value()) == made
    with pytest.raises(ModelError, match="hidden_act"):
        plan(parse(LINEAR | {"allow_config": ["rope_theta"]}))


def test_the_base_is_compared_too(llamas: Path) -> None:
    change(llamas / "y", rms_norm_eps=0.1)
    with pytest.raises(ModelError, match=r"rms_norm_eps is 0.1 in y, 1e-06 in x"):
        api.merge(parse({"method": "ties", "base": "y", "models": [{"model": "x"}]}), "out")


def test_what_does_not_change_the_weights_is_noted_and_comes_from_the_first(llamas: Path) -> None:
    change(llamas / "x", eos_token_id=2, max_position_embeddings=128)
    change(llamas / "y", eos_token_id=3, max_position_embeddings=256, my_remark="hi", use_cache=False)
    planned = plan(parse(LINEAR))
    assert planned.main is not None
    note = next(note for note in planned.notes if "do not change the weights" in note)
    assert "eos_token_id (3 in y)" in note
    assert "max_position_embeddings (256 in y)" in note
    assert "use_cache" not in note
    for folder in (llamas / "x", llamas / "y"):
        change(folder, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ModelError, match="max_position_embeddings is 128 in x, 256 in y"):
        plan(parse(LINEAR))


def test_slices_may_come_from_models_of_other_depths(llamas: Path) -> None:
    folders.write(llamas / "deep", folders.weights(3, layers=5), config=HEADS | {"num_hidden_layers": 5})
    slices = [
        {"sources": [{"model": "x", "layers": [0, 2]}]}, {"sources": [{"model": "deep", "layers": [2, 5]}]}
    ]  # fmt: skip
    document = {"method": "passthrough", "models": [{"model": "x"}, {"model": "deep"}], "slices": slices}
    assert len(plan(parse(document)).jobs) == 5 * 3 + 3
    change(llamas / "deep", rope_theta=1e6)
    with pytest.raises(ModelError, match=r"rope_theta is 1[0.]+ in"):
        plan(parse(document))


def test_equal_settings_need_no_configuration_class(llamas: Path) -> None:
    from merges.inputs.sources import open_source

    x, y = open_source("x"), open_source("y")
    assert compare(x, [y]) == ([], [])


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"rope_theta": 1e4, "rope_scaling": None}, {"rope_theta": 1e4}),
        ({"rope_theta": 1e4, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "linear", "factor": 2.0}},
        ),
    ],
)
def test_two_spellings_of_rope_need_no_configuration_class(
    older: dict[str, Any], newer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def imported(config: Any) -> Any:
        raise AssertionError("transformers is imported")

    monkeypatch.setattr("merges.recipes.agreement.settings._class_of", imported)
    assert differences({"model_type": "llama"} | older, {"model_type": "llama"} | newer) == []
    with pytest.raises(AssertionError, match="transformers is imported"):  # null and absent may differ by a default
        differences({"model_type": "llama", "head_dim": None} | older, {"model_type": "llama"} | newer)


def table() -> str:
    """The table of docs/merge.md, from what is tested here."""
    refused_ = ", ".join(dict.fromkeys(f"`{field}`" for _, field, _ in CHANGED))
    rows = [
        ("field of `config.json`", "if inputs differ"),
        ("---", "---"),
        (f"{refused_}, and all others that the configuration class has, in nested configurations too", "refused with "
         "both values, unless `--allow-config KEY` or `allow_config: [KEY]` allows it"),
        *((f"{g.meaning}: {', '.join(f'`{f}`' for f in g.fields)}", "noted" if g.noted else "ignored") for g in GROUPS),
        ("fields that the configuration class does not have", "noted"),
    ]  # fmt: skip
    return "\n".join(f"| {field} | {outcome} |" for field, outcome in rows)


def test_the_documented_table_is_the_one_that_is_tested() -> None:
    assert table() in (Path(__file__).parents[3] / "docs" / "merge.md").read_text(), table()
