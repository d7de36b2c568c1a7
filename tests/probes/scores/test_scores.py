"""Scores: each by a closed form, and a module that is none is refused by name."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from probes import scores
from probes.models.completions import Completion
from probes.scores import Measured
from vectors.errors import UsageError
from vectors.registry import plugins


def measured(logits: torch.Tensor, ids: list[int], base: torch.Tensor | None = None) -> Measured:
    return Measured(Completion([0], ids), logits, base)


def test_every_score_says_what_it_is() -> None:
    for name, score in scores.scores().items():
        assert score.SUMMARY, name
        assert score.UNIT, name


def test_the_likelihood_of_uniform_logits_is_that_of_a_fair_die() -> None:
    assert scores.score("likelihood").score(measured(torch.zeros(3, 6), [0, 4, 5])) == pytest.approx(-math.log(6))


def test_perplexity_of_uniform_logits_is_the_size_of_the_vocabulary() -> None:
    perplexity = scores.score("perplexity")
    parts = [perplexity.score(measured(torch.zeros(n, 6), [1] * n)) for n in (1, 4)]
    assert perplexity.combine(parts) == pytest.approx(6)


def test_the_divergence_of_a_certain_base_from_a_uniform_model_is_the_log_of_the_vocabulary() -> None:
    base = torch.tensor([[100.0, 0.0, 0.0, 0.0]])
    assert scores.score("divergence").score(measured(torch.zeros(1, 4), [0], base)) == pytest.approx(math.log(4))


def test_the_greatest_difference_of_logits_is_found() -> None:
    base = torch.zeros(2, 3)
    logits = base.clone()
    logits[1, 2] = -0.5
    assert scores.score("logit_difference").score(measured(logits, [0, 1], base)) == pytest.approx(0.5)


def test_a_loop_repeats_itself_and_distinct_tokens_do_not() -> None:
    repetition = scores.score("repetition")
    assert repetition.score(Measured(Completion([0], list(range(12))))) == 0.0
    assert repetition.score(Measured(Completion([0], [1, 2, 3, 4] * 5))) > 0.7


def test_a_module_that_is_no_score_is_refused_with_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = SimpleNamespace(SUMMARY="", SOURCE="", NEEDS="logits", score=lambda measured: 0.0)
    monkeypatch.setattr(plugins, "discover", lambda package, group: {"broken": broken})
    with pytest.raises(UsageError, match="the score 'broken' has no UNIT"):
        scores.scores()


def test_a_score_that_is_not_there_gets_a_guess() -> None:
    with pytest.raises(UsageError, match="there is no score 'perplexty'"):
        scores.score("perplexty")
