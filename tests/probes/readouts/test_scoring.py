"""Scores of texts, token by token: they are h w + b, in whatever batches and order the texts come."""

from __future__ import annotations

from typing import Any

import pico
import pytest
import torch

from probes.models.tokens import Tokens
from probes.readouts.scoring import POOLS, pooled, text_scores, token_scores
from vectors.errors import ModelError, UsageError
from vectors.probe import Readout

GENERATOR = torch.Generator().manual_seed(0)
READOUTS = {
    3: Readout(torch.randn(pico.HIDDEN, generator=GENERATOR), 0.5),
    0: Readout(torch.randn(pico.HIDDEN, generator=GENERATOR), -2.0),
}
TEXTS = [Tokens(ids, list(range(1, len(ids)))) for ids in pico.sequences(7, 3, 20)]


def test_a_score_is_the_product_of_the_residual_stream_with_the_weight(model: Any) -> None:
    """Of every architecture; the reference are transformers' hidden states, a text at a time."""
    found = token_scores(model, TEXTS, {2: READOUTS[3], 0: READOUTS[0]})
    for text, scores in zip(TEXTS, found, strict=True):
        states = model(input_ids=torch.tensor([text.ids]), output_hidden_states=True, use_cache=False).hidden_states
        expected = torch.stack(
            [states[3][0] @ READOUTS[3].weight + 0.5, states[1][0] @ READOUTS[0].weight - 2.0], dim=1
        )
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_the_order_of_the_texts_changes_no_bit_and_the_batch_no_more_than_rounding(llama: Any) -> None:
    plain = token_scores(llama, TEXTS, READOUTS)
    backwards = token_scores(llama, TEXTS[::-1], READOUTS)[::-1]
    alone = token_scores(llama, TEXTS, READOUTS, batch=1)
    for a, b, c in zip(plain, backwards, alone, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", POOLS)
def test_a_text_is_scored_from_the_tokens_that_count(llama: Any, pool: Any) -> None:
    texts = [text._replace(counted=[1, 2]) for text in TEXTS]
    tokens = token_scores(llama, texts, READOUTS)
    reduce = {"mean": lambda t: t.mean(0), "max": lambda t: t.amax(0), "last": lambda t: t[-1]}[pool]
    expected = torch.stack([reduce(scores[1:3]) for scores in tokens])
    assert torch.equal(text_scores(llama, texts, READOUTS, pool=pool), expected)


def test_an_unknown_pooling_is_refused_before_the_model_runs() -> None:
    with pytest.raises(UsageError, match="there is no pooling 'median'"):
        text_scores(torch.nn.Identity(), TEXTS, READOUTS, pool="median")  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        pooled(torch.ones(3), [0], "median")  # type: ignore[arg-type]


def test_an_activation_that_is_not_finite_is_refused_by_layer_and_text() -> None:
    broken = pico.build("llama")
    with torch.no_grad():
        broken.get_input_embeddings().weight[TEXTS[2].ids[1]] = torch.nan
    with pytest.raises(ModelError, match="layer 3 is not finite for"):
        token_scores(broken, [TEXTS[2]._replace(origin="x.jsonl:3")], {3: READOUTS[3]})
