"""Attention's entropy and saturation: their closed forms, in every architecture with softmax attention."""

from __future__ import annotations

import math
from typing import Any

import pico
import pytest
import torch

from probes.internals.attention import changes, heads, of_weights
from probes.models.tokens import Tokens
from vectors.errors import ExampleError

TEXTS = [Tokens(ids, list(range(1, len(ids)))) for ids in pico.sequences(3, 5, 9)]


def causal(scores: torch.Tensor) -> torch.Tensor:
    size = scores.shape[-1]
    return torch.softmax(scores.masked_fill(~torch.ones(size, size).tril().bool(), -torch.inf), -1)


def test_uniform_attention_has_relative_entropy_1_and_attention_on_one_token_0() -> None:
    entropy, saturated, sink = of_weights(causal(torch.zeros(2, 6, 6)))
    assert entropy.tolist() == pytest.approx([1.0, 1.0])
    assert saturated.tolist() == [0.0, 0.0]
    assert sink.tolist() == pytest.approx([sum(1 / n for n in range(2, 7)) / 5] * 2)
    first = torch.zeros(1, 6, 6)
    first[..., 0] = 100.0
    entropy, saturated, sink = of_weights(causal(first))
    assert float(entropy) == pytest.approx(0.0, abs=1e-9)
    assert (float(saturated), float(sink)) == (1.0, pytest.approx(1.0))


def test_entropy_is_relative_to_what_a_query_sees_in_its_window() -> None:
    size, window = 7, 3
    seen = torch.ones(size, size).tril() - torch.ones(size, size).tril(-window)
    weights = (seen / seen.sum(1, keepdim=True))[None]
    assert float(of_weights(weights, window)[0]) == pytest.approx(1.0)
    assert float(of_weights(weights)[0]) < 0.9


def test_entropy_is_that_of_the_definition() -> None:
    weights = causal(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)))
    expected = []
    for head in weights:
        rows = [
            -sum(float(p) * math.log(float(p)) for p in head[i, : i + 1]) / math.log(i + 1) for i in range(1, len(head))
        ]
        expected.append(sum(rows) / len(rows))
    assert of_weights(weights)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_every_architecture_gives_the_figures_of_its_heads(architecture: str) -> None:
    model = pico.build(architecture)
    found = heads(model, TEXTS)
    assert model.config._attn_implementation == "sdpa"
    assert found.entropy
    for layer, entropy in found.entropy.items():
        assert entropy.shape == (3, 4)
        assert bool(((entropy > 0) & (entropy <= 1)).all()), layer


def test_queries_of_zero_attend_uniformly_and_long_ones_saturate() -> None:
    model = pico.build("llama")
    before = heads(model, TEXTS)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.zero_()
        model.model.layers[2].self_attn.q_proj.weight.mul_(1e4)
    after = heads(model, TEXTS)
    torch.testing.assert_close(after.entropy[0], before.entropy[0])
    torch.testing.assert_close(after.entropy[1], torch.ones(3, 4).double())
    assert float(after.entropy[2].max()) < 0.1
    assert float(after.saturated[2].min()) > 0.8


def test_the_changes_of_heads_come_with_an_interval_the_greatest_first() -> None:
    model = pico.build("llama")
    texts = [Tokens(ids, list(range(1, len(ids)))) for ids in pico.sequences(30, 5, 9)]
    before = heads(model, texts)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[:8] = 0  # head 0
    found = changes(before.entropy, heads(model, texts).entropy, 0)
    first = found[0]
    assert (first.layer, first.head) == (1, 0)
    assert first.change == pytest.approx(1 - first.before)
    assert first.changed
    assert 0 < first.low <= first.change <= first.high
    untouched = next(each for each in found if (each.layer, each.head) == (1, 1))
    assert (untouched.low, untouched.change, untouched.high, untouched.changed) == (0, 0, 0, False)


def test_few_texts_give_figures_and_no_verdict_and_one_text_no_interval() -> None:
    before = torch.rand(29, 4, generator=torch.Generator().manual_seed(0)).double()
    after = before + 1 + before**2
    few = changes({0: before}, {0: after}, 0)
    assert all(each.changed is None and each.low > 0 for each in few)
    single = changes({0: before[:1]}, {0: after[:1]}, 0)
    assert {(each.low, each.high, each.p_adjusted, each.changed) for each in single} == {(None, None, None, None)}


def test_heads_that_only_vary_have_not_changed_however_many_there_are() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = ({i: torch.rand(40, 9, generator=generator).double() for i in range(30)} for _ in range(2))
    assert not any(each.changed for each in changes(before, after, 0))


def test_a_text_of_one_token_is_refused(llama: Any) -> None:
    with pytest.raises(ExampleError, match="has one token"):
        heads(llama, [Tokens([5], [0])])
