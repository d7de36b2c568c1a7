"""mergekit's YAML as it stands: every word has its meaning, or is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import folders
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merges import api, methods
from merges.recipes import chat_templates
from merges.recipes.document import parse, read
from merges.recipes.mergekit import words as mergekit
from merges.recipes.parameters import value_at
from merges.recipes.validation import require_valid
from vectors.errors import ModelError, SteerError, UsageError

TIES = {"merge_method": "ties", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}]}


def test_it_is_read_as_it_stands(here: Path) -> None:
    (here / "mk.yaml").write_text(
        "merge_method: ties\nbase_model: base\nmodels:\n  - model: base\n"
        "  - model: a\n    parameters: {weight: 1.0, density: 0.5}\n"
        "  - model: b\n    parameters:\n      density: [0.2, 0.8]\n"
        "      weight:\n        - {filter: mlp, value: 0.5}\n        - value: 1\n"
        "parameters: {normalize: true, int8_mask: true}\ndtype: float32\nout_dtype: bfloat16\n"
    )
    made = read(here / "mk.yaml")
    assert [p.model for p in made.parts] == ["a", "b"]
    assert made.options == {"elect": "after", "zero": "positive", "combine": "mean", "density": 1.0}
    assert made.dtype == "bfloat16"
    api.merge(made, "out")
    (here / "slerp.yaml").write_text(
        "merge_method: slerp\nbase_model: a\nslices:\n  - sources:\n"
        "      - {model: b, layer_range: [0, 3]}\n      - {model: a, layer_range: [0, 3]}\n"
        "parameters:\n  t:\n    - {filter: self_attn, value: [0, 0.5, 1]}\n    - value: 0.5\ndtype: bfloat16\n"
    )
    api.merge(read(here / "slerp.yaml"), "out2")  # from the base to the other, whichever comes first
    a, b, out = (folders.read(here / name) for name in ("a", "b", "out2"))
    q = "model.layers.{}.self_attn.q_proj.weight"
    assert torch.equal(out[q.format(0)], a[q.format(0)])
    assert torch.equal(out[q.format(2)], b[q.format(2)])


@pytest.mark.parametrize(
    ("method", "parameters", "ours"),
    [
        ("ties", {"rescale": True, "normalize": False}, {"rescale": "l1", "combine": "sum"}),
        ("dare_linear", {"rescale": False}, {"rescale": "none"}),
        ("breadcrumbs", {"gamma": 0.02, "rescale": True}, {"rescale": "l1", "gamma": 0.02}),
        ("nuslerp", {"nuslerp_row_wise": True}, {}),
        ("nuslerp", {"nuslerp_flatten": False}, {"along": "rows"}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, {"along": "columns"}),
        ("multislerp", {"normalize_weights": True, "eps": 1e-8}, {"normalize": True}),
        ("multislerp", {"normalize_weights": False}, {"normalize": False}),
    ],
)
def test_each_word_has_its_meaning(method: str, parameters: dict[str, Any], ours: dict[str, Any]) -> None:
    made = parse(TIES | {"merge_method": method, "parameters": parameters})
    assert {key: made.options[key] for key in ours} == ours
    assert {"along"} - set(ours) <= {"along"} - set(made.options)


def test_every_method_of_mergekit_is_known() -> None:
    assert set(mergekit.METHODS) == set(methods.available()) - {"fisher", "regmean", "tsv", "iso_c"}
    for method, words in mergekit.METHODS.items():
        known = {option.name for option in methods.find(method).options}
        assert {word.option for word in words.values() if word.option} <= known


def test_what_mergekit_would_ignore_is_an_error(here: Path) -> None:
    with pytest.raises(UsageError) as caught:
        parse(
            TIES
            | {
                "modles": [],
                "models": [{"model": "a", "paramaters": {}}, {"model": "b", "parameters": {"densty": 0.5}}],
                "slices": [{"residual_weight": 1, "sources": [{"model": "a", "layer_rang": [0, 1]}]}],
                "tokenizer": {"sorce": "union", "tokens": {"x": {"source": "a", "forced": True}}},
                "parameters": {"normalize": "maybe"},
                "modules": {"text": {"modles": []}, "vision": {}},
            }
        )
    found = "\n".join(caught.value.problems)
    for sentence in (
        "'modles' (did you mean mod", "'paramaters'", "'densty' (did you mean density?)",
        "'layer_rang'", "'sorce'", "'forced'", "normalize is 'maybe', not true or false",
        "'modles' in the module text (did you mean models?)",
        "modules are text, vision beside models beside slices", "residual_weight of slice 1 has no effect in mergekit",
    ):  # fmt: skip
        assert sentence in found


@pytest.mark.parametrize(
    ("method", "word", "value"),
    [
        ("slerp", "density", 0.5),
        ("slerp", "normalize", True),
        ("linear", "int8_mask", 1.0),
        ("model_stock", "normalize", "yes"),
        ("passthrough", "rescale", False),
        ("karcher", "weight", [0.1, 0.2]),
    ],
)
def test_a_parameter_of_another_method_has_no_effect_and_is_noted(method: str, word: str, value: Any) -> None:
    made = parse(TIES | {"merge_method": method, "parameters": {"t": 0.5, word: value}})
    assert f"{method} has no parameter {word!r}, which has no effect" in made.notes
    assert word not in made.options


def test_what_applies_to_all_inputs_has_no_effect_under_one_of_them(here: Path) -> None:
    sources = [{"model": name, "layer_range": [0, 3], "parameters": {"lambda": 0.5, "t": 1}} for name in "ab"]
    for document in (
        TIES | {"models": [{"model": "a", "parameters": {"weight": 1, "lambda": 0.5}}, {"model": "base"}]},
        {"merge_method": "slerp", "base_model": "a", "slices": [{"sources": sources}]},
    ):
        made = parse(document)
        assert not {"lambda", "t"} & set(made.options)
        assert any("applies to all inputs together" in note for note in made.notes)
    with pytest.raises(ModelError, match="the required parameter t has no value"):
        api.merge(made, "out")  # mergekit: Missing required parameter t


def test_a_filter_with_wildcards_matches_what_mergekit_matches() -> None:
    weight = [{"filter": "*.mlp.*", "value": 0.1}, {"filter": "mlp", "value": 0.2}, {"value": 0.3}]
    made = parse(TIES | {"models": [{"model": "a", "parameters": {"weight": weight}}, {"model": "b"}]})
    assert value_at(made.parts[0].options["weight"], "model.layers.0.mlp.up_proj.weight", 0) == 0.2
    assert value_at(made.parts[0].options["weight"], "odd*.mlp.*", 0) == 0.1
    assert "mergekit's filters have no wildcards: '*.mlp.*' of weight" in made.notes[0]


def test_an_input_that_is_listed_twice_counts_twice(here: Path) -> None:
    twice = [{"model": "a", "parameters": {"weight": 0.25}}, {"model": "a", "parameters": {"weight": 0.25}}]
    once = [{"model": "a", "parameters": {"weight": 0.5}}]
    b = [{"model": "b", "parameters": {"weight": 0.5}}]
    for name, models in (("twice", twice + b), ("once", once + b), ("left", twice[:1] + b)):
        api.merge(parse({"merge_method": "linear", "models": models, "dtype": "float32"}), name)
    two, one, left = (folders.read(here / name) for name in ("twice", "once", "left"))
    for name in one:
        torch.testing.assert_close(two[name], one[name])
    assert not all(torch.allclose(two[name], left[name]) for name in one)


def test_a_base_that_is_not_listed_is_merged_where_mergekit_merges_it(here: Path) -> None:
    listed = [{"model": name} for name in ("a", "b", "base")]
    for method, parameters in (("linear", {"weight": 1.0}), ("karcher", {})):
        document = {"merge_method": method, "base_model": "base", "parameters": parameters}
        api.merge(parse(document | {"models": listed[:2]}), f"{method} unlisted")
        api.merge(parse(document | {"models": listed}), f"{method} listed")
        assert folders.same(here / f"{method} unlisted", here / f"{method} listed")


def test_a_base_among_the_sources_of_a_slice_is_no_input(here: Path) -> None:
    sources = [{"model": name, "layer_range": [0, 3]} for name in ("base", "a", "b")]
    shared = {"weight": 1.0, "normalize": True}
    sliced = TIES | {"merge_method": "task_arithmetic", "slices": [{"sources": sources}], "parameters": shared}
    api.merge(parse({k: v for k, v in sliced.items() if k != "models"}), "sliced")
    api.merge(parse(TIES | {"merge_method": "task_arithmetic", "parameters": shared}), "plain")
    assert folders.same(here / "sliced", here / "plain")


def test_slices_take_thresholds_over_the_whole_model_too(here: Path) -> None:
    whole = {"method": "ties", "base": "base", "models": [{"model": "a"}, {"model": "b"}], "scope": "global"}
    sources = [{"model": name, "layers": [0, 3]} for name in "ab"]
    api.merge(parse(whole), "plain")
    api.merge(parse(whole | {"slices": [{"sources": sources}]}), "sliced")
    api.merge(parse(whole | {"slices": [{"sources": sources}], "scope": "tensor"}), "each")
    assert folders.same(here / "sliced", here / "plain")
    assert not folders.same(here / "each", here / "plain")


def test_a_model_is_named_by_a_mapping_too() -> None:
    named = {"model": {"path": "org/a", "revision": "v2"}, "lora": {"path": "tuned"}}
    models = [{"model": named}, {"model": {"model": "b"}}]
    made = parse(TIES | {"base_model": {"model": {"path": "base"}}, "models": models})
    assert (made.base, [part.model for part in made.parts]) == ("base", ["org/a@v2+tuned", "b"])
    for wrong, sentence in [
        ({"model": {"path": 3}}, "instead of a path"),
        ({"model": {"path": "a", "revison": "v2"}}, "unknown key 'revison'"),
        ({"lora": "a"}, "has no model"),
        ({"model": "a", "override_architecture": "X"}, "can't be overridden here"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            parse(TIES | {"models": [{"model": wrong}, {"model": "b"}]})


def test_one_module_is_the_model() -> None:
    module = {"models": TIES["models"], "parameters": {"density": 0.5}}
    above = {"merge_method": "ties", "base_model": "base", "parameters": {"density": 0.3, "lambda": 0.9}}
    assert parse(above | {"modules": {"default": module}}) == parse(
        above | {"models": TIES["models"], "parameters": {"density": 0.5, "lambda": 0.9}}
    )


def test_a_slice_may_have_a_base_of_its_own(here: Path) -> None:
    def slices(names: str) -> list[dict[str, Any]]:
        return [{"sources": [{"model": name, "layer_range": [0, 3]} for name in pair]} for pair in names.split()]

    shared = {"merge_method": "task_arithmetic", "parameters": {"weight": 1.0}}
    own = [entry | {"base_model": base} for entry, base in zip(slices("a b"), ("base", "a"), strict=True)]
    made = parse(shared | {"base_model": "base", "slices": own})
    assert parse(made.value()).digest == made.digest
    assert [entry.base for entry in made.renamed({"a": "moved"}).slices] == ["base", "moved"]
    api.merge(made, "out")
    a, b, base, out = (folders.read(here / name) for name in ("a", "b", "base", "out"))
    q = "model.layers.{}.self_attn.q_proj.weight"
    for layer in range(3):  # base + (a - base), then a + (b - a)
        for ours, theirs in ((layer, a), (layer + 3, b)):
            torch.testing.assert_close(out[q.format(ours)], theirs[q.format(layer)])
    assert not torch.equal(base[q.format(0)], a[q.format(0)])
    with pytest.raises(SteerError, match="a slice names elsewhere"):
        api.merge(parse(made.value() | {"slices": [made.slices[0].value() | {"base": "elsewhere"}]}), "never")
    # Of a pair, it is the one at t = 0.
    pairs = [entry | {"base_model": base} for entry, base in zip(slices("ab ab"), "ab", strict=True)]
    api.merge(parse({"merge_method": "slerp", "slices": pairs, "parameters": {"t": 0}}), "pairs")
    out = folders.read(here / "pairs")
    for layer in range(3):
        assert torch.equal(out[q.format(layer)], a[q.format(layer)])
        assert torch.equal(out[q.format(layer + 3)], b[q.format(layer)])
    with pytest.raises(UsageError, match="the base base of slice 2 is not among its sources"):
        parse({"merge_method": "slerp", "slices": [pairs[0], pairs[1] | {"base_model": "base"}]})


def test_a_gradient_runs_over_the_layers_of_its_slice(here: Path) -> None:
    sources = [{"model": name, "layer_range": [0, 3]} for name in "ab"]
    two = [{"sources": sources, "parameters": {"t": [0, 1]}}] * 2
    api.merge(parse({"merge_method": "slerp", "base_model": "a", "slices": two}), "out")
    a, b, out = (folders.read(here / name) for name in ("a", "b", "out"))
    q = "model.layers.{}.self_attn.q_proj.weight"
    for start in (0, 3):
        assert torch.equal(out[q.format(start)], a[q.format(0)])
        assert torch.equal(out[q.format(start + 2)], b[q.format(2)])


CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi  there "},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]
RENDERED = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi  there <|im_end|>\n"
    "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi  there<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be kind.\n\nHi  there  [/INST] Yes.</s> [INST] Why? [/INST]",
    "exaone": "[|system|]Be kind.[|endofturn|]\n[|user|]Hi  there \n[|assistant|]Yes.[|endofturn|]\n"
    "[|user|]Why?\n[|assistant|]",
    "alpaca": "Be kind.\n\n### Instruction:\nHi  there\n\n### Response:\nYes.\n\n### Instruction:\nWhy?\n\n"
    "### Response:\n",
}


@pytest.mark.parametrize("name", chat_templates.NAMED)
def test_a_chat_template_has_a_name(here: Path, tokenizer: Any, name: str) -> None:
    api.merge(parse(TIES | {"chat_template": name, "parameters": {"weight": 1.0}}), "out")
    said = {"chat_template": (here / "out" / "chat_template.jinja").read_text(), "tokenize": False}
    said |= {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.apply_chat_template(CHAT, **said) == RENDERED[name]
    assert "Be kind" not in tokenizer.apply_chat_template(CHAT[1:2], **said)
    with pytest.raises(UsageError, match=r"chat_template is 'chatm'.*did you mean chatml"):
        require_valid(parse(TIES | {"chat_template": "chatm"}))


words = st.sampled_from(
    ["ties", "a", "union", "base", "zero", "auto", "model_token", "weight", "density", "", "global", "0.5", "{{ x }}"]
)
keys = st.sampled_from(
    [
        "merge_method", "method", "base_model", "base", "models", "model", "slices", "sources", "layer_range", "layers",
        "parameters", "tokenizer", "tokenizer_source", "source", "tokens", "token", "kind", "force", "weight", "t",
        "density", "seed", "scope", "dtype", "as", "chat_template", "normalize", "filter", "value", "name", 3, None,
    ]
)  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=6),
    max_leaves=20,
)


@settings(max_examples=60)
@given(value=values, ours=st.booleans(), method=st.sampled_from(["ties", "slerp", "fisher", "nuslerp"]), more=values)
def test_whatever_yaml_holds_is_a_recipe_or_a_clear_error(value: Any, ours: bool, method: str, more: Any) -> None:
    given_ = value if isinstance(value, dict) else {"models": value, "parameters": more, "slices": more}
    with contextlib.suppress(SteerError):
        made = parse(given_ | {("method" if ours else "merge_method"): method})
        require_valid(made)
        assert parse(made.value()).digest == made.digest


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "base_model: a\ngate_mode: hidden\nexperts:\n  - source_model: a\n    positive_prompts: [hi]\n",
            "mergekit-moe",
        ),
        ("genome:\n  models: [a, b]\n  merge_method: linear\n", "mergekit-evolve"),
        (
            "name: one\nmerge_method: linear\nmodels: []\n---\nname: two\n",
            "several documents, as files of mergekit-multi",
        ),
    ],
)
def test_files_of_mergekits_other_tools_are_refused_by_name(here: Path, text: str, sentence: str) -> None:
    (here / "other.yaml").write_text(text)
    with pytest.raises(UsageError, match=sentence):
        read(here / "other.yaml")


def test_a_single_input_that_is_trimmed_is_named(here: Path) -> None:
    from merges.recipes.plan import plan

    alone = {"method": "ties", "base": "base", "models": [{"model": "a"}]}
    assert any(
        "ties of one input elects nothing" in note and "density 0.2" in note for note in plan(parse(alone)).notes
    )
    for whole in (alone | {"parameters": {"density": 1.0}}, alone | {"method": "linear"}):
        assert not any("of one input" in note for note in plan(parse(whole)).notes)
