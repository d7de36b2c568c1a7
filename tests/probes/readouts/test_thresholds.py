"""Thresholds at a stated false-positive rate: the bound holds whatever the distribution, and intervals are exact."""

from __future__ import annotations

import pytest
import torch

from probes.data.examples import Example
from probes.readouts.gate import sides
from probes.readouts.thresholds import clopper_pearson, rate_above, rate_of_tokens_above, threshold_for
from vectors.errors import ExampleError


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("kind", ["normal", "heavy", "ties"])
def test_new_negatives_exceed_the_threshold_at_the_stated_rate_or_less(rate: float, kind: str) -> None:
    """The mean over 400 draws of the exact rate, which a draw of 20,000 gives."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        noise = torch.randn(count, generator=generator, dtype=torch.float64)
        return {"normal": noise, "heavy": noise**3 * 9, "ties": (2 * noise).round()}[kind]

    population = draw(20_000)
    rates = [float((population > threshold_for(draw(150), rate).value).double().mean()) for _ in range(400)]
    mean, error = sum(rates) / 400, float(torch.tensor(rates).std()) / 20
    assert mean <= rate + 3 * error + 1e-3
    if kind != "ties":
        bound = threshold_for(draw(150), rate).bound
        assert mean == pytest.approx(bound, abs=3 * error + 2e-3)


def test_the_interval_of_the_measured_rate_covers_the_true_one() -> None:
    """95 % intervals of 50 of a binomial with p = 0.1 cover it in at least 95 % of 400 draws."""
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(400):
        found = rate_above((torch.rand(50, generator=generator) < 0.1).double(), 0.5)
        covered += found.low <= 0.1 <= found.high
    assert covered / 400 >= 0.94


def test_the_number_of_false_positives_on_other_data_is_beta_binomial() -> None:
    """Its upper tail is called surprising (2.5 %) in at most that share of 1,500 draws, and in most of that share."""
    generator = torch.Generator().manual_seed(3)
    surprising = 0
    for _ in range(1_500):
        threshold = threshold_for(torch.randn(60, generator=generator, dtype=torch.float64), 0.1)
        above = int((torch.randn(60, generator=generator, dtype=torch.float64) > threshold.value).sum())
        surprising += threshold.probability_of(above, 60) < 0.025
    assert 0.008 < surprising / 1_500 < 0.033
    assert threshold.probability_of(0, 60) == pytest.approx(1.0)
    binomial = pytest.importorskip("scipy.stats").betabinom(60, 6, 55)
    assert threshold.probability_of(9, 60) == pytest.approx(binomial.sf(8), rel=1e-9)


def test_clopper_and_pearson_agree_with_the_beta_distribution() -> None:
    stats = pytest.importorskip("scipy.stats")
    for count, total in ((0, 10), (1, 10), (7, 10), (10, 10), (3, 400)):
        expected = stats.binomtest(count, total).proportion_ci(method="exact")
        assert clopper_pearson(count, total) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert clopper_pearson(0, 0) == (0.0, 1.0)


def test_too_few_negatives_for_a_rate_are_refused_with_the_number_that_would_do() -> None:
    with pytest.raises(ExampleError, match=r"50 negatives .* too few for a false-positive rate of 0\.01") as caught:
        threshold_for(torch.zeros(50), 0.01)
    assert "must be 99: give more, or --fpr 0.02" in caught.value.hint
    assert threshold_for(torch.zeros(50), 0.02).bound <= 0.02
    assert threshold_for(torch.arange(99.0), 0.01).value == 98.0


def test_tokens_of_a_text_that_are_alike_widen_the_interval() -> None:
    """30 texts of 20 equal tokens are 30 decisions, not 600."""
    generator = torch.Generator().manual_seed(2)
    alike = [torch.full((20,), float(torch.randn((), generator=generator))) for _ in range(30)]
    apart = [torch.randn(20, generator=generator) for _ in range(30)]
    wide, narrow = (rate_of_tokens_above(texts, 0.5, 0) for texts in (alike, apart))
    assert wide.high - wide.low > 2.5 * (narrow.high - narrow.low)
    assert wide.total == narrow.total == 600
    none = rate_of_tokens_above(alike, 99.0, 0)
    assert (none.above, none.low) == (0, 0.0)
    assert none.high == pytest.approx(clopper_pearson(0, 30)[1])


def test_texts_of_one_group_count_as_one_where_they_are_alike() -> None:
    groups = [str(i // 5) for i in range(60)]
    none = rate_above(torch.zeros(60), 0.5, groups)
    assert (none.above, none.total) == (0, 60)
    assert none.high > rate_above(torch.zeros(12), 0.5).high - 0.01 > 3 * rate_above(torch.zeros(60), 0.5).high
    apart = [str(i) for i in range(60)]
    assert rate_above(torch.zeros(60), 0.5, apart) == rate_above(torch.zeros(60), 0.5)
    tokens = [torch.zeros(7)] * 60
    assert rate_of_tokens_above(tokens, 0.5, 0, groups).high == clopper_pearson(0, 12)[1]


def test_an_example_never_changes_sides_and_copies_stay_together() -> None:
    examples = [Example(f"answer {i}", f"question {i % 50}") for i in range(100)]
    found = sides(examples, 0)
    assert found[:50] == found[50:]
    assert sides(examples[10:20], 0) == found[10:20]
    assert 10 < sum(found[:50]) < 40
    assert sides(examples, 1) != found
