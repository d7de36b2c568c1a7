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

from merges import mergekit, methods, running
from merges.recipe import parse, read, refuse
from vectors.errors import SteerError, UsageError

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
    running.merge(made, "out")
    (here / "slerp.yaml").write_text(
        "merge_method: slerp\nbase_model: a\nslices:\n  - sources:\n"
        "      - {model: b, layer_range: [0, 3]}\n      - {model: a, layer_range: [0, 3]}\n"
        "parameters:\n  t:\n    - {filter: self_attn, value: [0, 0.5, 1]}\n    - value: 0.5\ndtype: bfloat16\n"
    )
    running.merge(read(here / "slerp.yaml"), "out2")  # from the base to the other, whichever comes first
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
        ("multislerp", {"normalize_weights": True, "eps": 1e-8}, {}),
    ],
)
def test_each_word_has_its_meaning(method: str, parameters: dict[str, Any], ours: dict[str, Any]) -> None:
    made = parse(TIES | {"merge_method": method, "parameters": parameters})
    assert {key: made.options[key] for key in ours} == ours
    assert {"along"} - set(ours) <= {"along"} - set(made.options)


def test_every_method_of_mergekit_is_known() -> None:
    assert set(mergekit.METHODS) == set(methods.available()) - {"fisher", "regmean", "tsv", "iso_c"}
    for method, words in mergekit.METHODS.items():
        known = {option.name for option in methods.find(method).OPTIONS}
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
                "parameters": {"normalize": "yes"},
                "chat_template": "chatml",
            }
        )
    found = "\n".join(caught.value.problems)
    for sentence in (
        "'modles' (did you mean models?)", "'paramaters'", "'densty' (did you mean density?)", "'residual_weight'",
        "'layer_rang'", "'sorce'", "'forced'", "normalize is 'yes', not true or false", "chat_template is 'chatml'",
    ):  # fmt: skip
        assert sentence in found
    with pytest.raises(UsageError, match="normalize_weights is always True here"):
        parse(TIES | {"merge_method": "multislerp", "parameters": {"normalize_weights": False}})
    with pytest.raises(UsageError, match="slerp has no parameter 'density'"):
        parse(TIES | {"merge_method": "slerp", "parameters": {"density": 0.5}})


def test_a_base_among_the_sources_of_a_slice_is_no_input(here: Path) -> None:
    sources = [{"model": name, "layer_range": [0, 3]} for name in ("base", "a", "b")]
    shared = {"weight": 1.0, "normalize": True}
    sliced = TIES | {"merge_method": "task_arithmetic", "slices": [{"sources": sources}], "parameters": shared}
    running.merge(parse({k: v for k, v in sliced.items() if k != "models"}), "sliced")
    running.merge(parse(TIES | {"merge_method": "task_arithmetic", "parameters": shared}), "plain")
    assert folders.same(here / "sliced", here / "plain")


def test_slices_take_thresholds_over_the_whole_model_too(here: Path) -> None:
    whole = {"method": "ties", "base": "base", "models": [{"model": "a"}, {"model": "b"}], "scope": "global"}
    sources = [{"model": name, "layers": [0, 3]} for name in "ab"]
    running.merge(parse(whole), "plain")
    running.merge(parse(whole | {"slices": [{"sources": sources}]}), "sliced")
    running.merge(parse(whole | {"slices": [{"sources": sources}], "scope": "tensor"}), "each")
    assert folders.same(here / "sliced", here / "plain")
    assert not folders.same(here / "each", here / "plain")


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
        refuse(made)
        assert parse(made.value()).digest == made.digest
