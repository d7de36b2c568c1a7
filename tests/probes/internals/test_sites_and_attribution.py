"""Sites beyond the output of blocks, and exact attribution. Runs where the extra `lens` is installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pico
import pytest
import torch

from probes.internals.attribution import attribute
from probes.models import loading
from probes.models.tokens import Tokens
from probes.readouts import sites
from vectors.errors import ModelError, UsageError
from vectors.steering import SteeringVector

NAMES = ("llama", "gpt2", "qwen3", "gemma2", "lfm2", "qwen3-next")
TEXTS = [Tokens(ids, list(range(1, len(ids)))) for ids in pico.sequences(2, 5, 9)]
VECTOR = SteeringVector(
    {i: torch.randn(pico.HIDDEN, generator=torch.Generator().manual_seed(i)) for i in (0, 1)}, {"apply": [0, 1]}
)


def bridge(folder: Path, name: str) -> Any:
    pytest.importorskip("transformer_lens.model_bridge", reason="the extra `lens` is not installed")
    # TransformerLens believes that a GPT-2 has as many key heads as heads, and others need fewer.
    settings = {"num_key_value_heads": 4} if name == "gpt2" else {}
    loaded = loading.load(pico.save(folder / name, name, **settings), "cpu", "float32")
    return sites.bridge_of(loaded, torch.device("cpu"), torch.float32)


def rows(bridged: Any, site: str, layers: list[int]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    states = sites.site_states(bridged, site, layers)
    states.run(TEXTS[:1], layers, lambda _index, _position, each: found.append(each), lambda _event: None)
    assert all(each.shape == (len(TEXTS[0].ids), states.size) for each in found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_block_adds_the_output_of_attention_and_of_the_mlp_to_the_stream(name: str, tmp_path: Path) -> None:
    bridged = bridge(tmp_path, name)
    layer = 3  # which has attention in every one of them
    parts = {site: rows(bridged, site, [layer])[0] for site in ("resid_pre", "attn_out", "resid_mid", "mlp_out")}
    (after,) = rows(bridged, "resid_post", [layer])
    torch.testing.assert_close(parts["resid_pre"] + parts["attn_out"], parts["resid_mid"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts["resid_mid"] + parts["mlp_out"], after, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_head_is_its_part_of_all_heads_and_any_hook_can_be_named(tmp_path: Path) -> None:
    bridged = bridge(tmp_path, "llama")
    (every,), (second,) = rows(bridged, "head", [1]), rows(bridged, "head:2", [1])
    assert torch.equal(every.view(len(every), 4, 8)[:, 2], second)
    assert rows(bridged, "blocks.{layer}.attn.hook_q", [1, 2])[0].shape[1] == 32
    with pytest.raises(UsageError, match="there is no head 9"):
        rows(bridged, "head:9", [1])
    with pytest.raises(ModelError, match=r"the model has no hook blocks\.1\.hook_nothing"):
        rows(bridged, "blocks.{layer}.hook_nothing", [1])
    with pytest.raises(ModelError, match="is not one row for each"):
        rows(bridged, "blocks.{layer}.attn.hook_pattern", [1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3-next"])
def test_the_parts_of_an_effect_add_up_to_it(name: str, tmp_path: Path) -> None:
    bridged = bridge(tmp_path, name)
    weight = torch.randn(pico.HIDDEN, generator=torch.Generator().manual_seed(9))
    for along in (None, weight):
        found = attribute(bridged, TEXTS, VECTOR, 0.5, 3, along)
        assert sum(each.contribution for each in found.components) == pytest.approx(found.total, rel=1e-3)
        assert {each.name for each in found.components} >= {"vector 0", "vector 1", "MLP 1", "MLP 3"}
    direct = next(each for each in found.components if each.name == "vector 1")
    assert direct.contribution == pytest.approx(0.5 * float(VECTOR.layers[1] @ weight), rel=1e-4)


@pytest.mark.slow
def test_heads_add_up_to_attention_and_where_a_norm_follows_them_they_are_refused(tmp_path: Path) -> None:
    bridged = bridge(tmp_path, "llama")
    whole = attribute(bridged, TEXTS, VECTOR, 1.0, 3)
    split = attribute(bridged, TEXTS, VECTOR, 1.0, 3, heads=True)
    assert split.total == pytest.approx(whole.total)
    for layer in (1, 2, 3):
        attention = next(each.contribution for each in whole.components if each.name == f"attention {layer}")
        parts = [each.contribution for each in split.components if each.name.startswith(f"head {layer}.")]
        assert len(parts) == 4
        assert sum(parts) == pytest.approx(attention, rel=1e-3, abs=1e-4)
    with pytest.raises(ModelError, match="do not add up"):
        attribute(bridge(tmp_path, "gemma2"), TEXTS, VECTOR, 1.0, 3, heads=True)


def test_names_of_sites_are_checked_before_anything_is_loaded() -> None:
    for site in ("resid_post", "head", "head:0", "blocks.{layer}.attn.hook_q"):
        sites.require_site(site)
    for site, problem in {
        "blocks.3.attn.hook_q": "does not say where the layer stands",
        "attn_oot": "did you mean attn_out",
        "head:x": "there is no site",
        "blocks.{layer}.{x}": "does not say where",
    }.items():
        with pytest.raises(UsageError, match=re.escape(problem)):
            sites.require_site(site)
