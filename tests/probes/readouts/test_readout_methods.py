"""Methods of probes: every one recovers a planted boundary, and its scores are log-odds after calibration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from probes.directions.evidence import evidence_of
from probes.intervals import auroc
from probes.readouts import calibration
from probes.readouts.fitting import Units, fit
from probes.readouts.methods import lda, method, methods, ridge

HIDDEN = 16
EVERY = pytest.mark.parametrize("name", methods())


def planted(count: int, distance: float, *, offset: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of two normal classes whose means are `distance` deviations apart, their labels, and the direction."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(HIDDEN, generator=generator, dtype=torch.float64), dim=0)
    rows = torch.randn(2 * count, HIDDEN, generator=generator, dtype=torch.float64) + offset
    labels = torch.arange(2 * count) < count
    rows[labels] += distance * direction
    return rows.float(), labels, direction


def units(labels: Tensor, folds: int = 5) -> Units:
    return Units(torch.arange(len(labels)), labels, torch.arange(len(labels)) % folds)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


@EVERY
def test_a_method_says_what_it_is_and_where_it_is_from(name: str) -> None:
    chosen = method(name)
    assert chosen.SUMMARY
    assert chosen.SOURCE
    assert chosen.__doc__


@EVERY
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_weight_and_bias_are_the_log_odds_of_two_normal_classes(name: str, offset: float) -> None:
    """For two normal classes with unit covariance, d apart, the log-odds are d (u h) less their value in the middle."""
    distance = 2.0
    rows, labels, direction = planted(3_000, distance, offset=offset)
    fitted = fit(method(name), rows, units(labels))
    assert fitted is not None
    weight, bias = fitted.readout
    assert cosine(weight, direction) > 0.99
    assert float(weight.double() @ direction) == pytest.approx(distance, rel=0.08)
    middle = torch.full((HIDDEN,), offset, dtype=torch.float64) + distance / 2 * direction
    assert abs(float(weight.double() @ middle) + bias) < 0.15


@EVERY
def test_held_out_figures_are_those_of_theory(name: str) -> None:
    """AUROC = Phi(d / sqrt 2); error rate at the boundary = Phi(-d / 2)."""
    distance = 1.5
    rows, labels, _ = planted(3_000, distance, seed=3)
    fitted = fit(method(name), rows, units(labels))
    assert fitted is not None
    scores = fitted.held_out

    def phi(x: float) -> float:
        return 0.5 * (1 + math.erf(x / math.sqrt(2)))

    assert auroc(scores[labels], scores[~labels]) == pytest.approx(phi(distance / math.sqrt(2)), abs=0.015)
    wrong = float(((scores > 0) != labels).double().mean())
    assert wrong == pytest.approx(phi(-distance / 2), abs=0.015)
    assert calibration.calibration_error(calibration.curve(scores, labels)) < 0.03


@EVERY
def test_classes_far_apart_are_told_apart_perfectly(name: str) -> None:
    rows, labels, _ = planted(40, 12.0)
    fitted = fit(method(name), rows, units(labels))
    assert fitted is not None
    assert auroc(fitted.held_out[labels], fitted.held_out[~labels]) == 1.0
    assert bool(((fitted.readout.scores(rows) > 0) == labels).all())


@EVERY
def test_labels_without_meaning_are_at_chance_when_held_out(name: str) -> None:
    rows, labels, _ = planted(150, 0.0, seed=5)
    fitted = fit(method(name), rows, units(labels))
    assert fitted is not None
    assert abs(auroc(fitted.held_out[labels], fitted.held_out[~labels]) - 0.5) < 0.12
    assert calibration.cross_entropy(fitted.held_out, labels) < math.log(2) + 0.1


@EVERY
def test_the_order_of_the_rows_has_no_influence(name: str) -> None:
    rows, labels, _ = planted(60, 2.0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    plain, shuffled = units(labels), units(labels)
    a = fit(method(name), rows, plain)
    b = fit(method(name), rows[order], shuffled._replace(labels=labels[order], fold=plain.fold[order]))
    assert a is not None
    assert b is not None
    torch.testing.assert_close(a.readout.weight, b.readout.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.held_out[order], b.held_out, rtol=1e-6, atol=1e-8)


@EVERY
def test_rows_that_are_all_the_same_give_no_readout(name: str) -> None:
    labels = torch.arange(10) < 5
    assert fit(method(name), torch.ones(10, HIDDEN), units(labels)) is None


def test_ridge_is_the_linear_discriminant_where_examples_abound() -> None:
    rows, labels, _ = planted(2_000, 2.0)
    rows = rows * torch.linspace(0.5, 2.0, HIDDEN)
    evidence = evidence_of("activations", rows, labels, paired=False)
    second = evidence_of("second moments", rows, labels, paired=False)
    assert cosine(ridge.readout(evidence)[0], lda.readout(second)[0]) > 0.995


def test_ridge_generalises_from_fewer_rows_than_features() -> None:
    rows, labels, _ = planted(6, 8.0)
    others, other_labels, _ = planted(400, 8.0)
    weight, bias = ridge.readout(evidence_of("activations", rows, labels, paired=False))
    scores = others.double() @ weight + bias
    assert auroc(scores[other_labels], scores[~other_labels]) > 0.99


# Texts of several rows


def test_the_score_of_a_text_is_pooled_from_its_rows() -> None:
    made = Units(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([True, False]), torch.tensor([0, 0]))
    scores = torch.tensor([1.0, 3.0, -5.0, 2.0, 0.0], dtype=torch.float64)
    assert made.pooled(scores, "mean").tolist() == [2.0, -1.0]
    assert made.pooled(scores, "max").tolist() == [3.0, 2.0]
    assert made.pooled(scores, "last").tolist() == [3.0, 0.0]


# Calibration


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_calibration_recovers_the_log_odds_whatever_the_share_of_a_class(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(40_000, generator=generator) < share
    truth = torch.randn(len(labels), generator=generator, dtype=torch.float64) + torch.where(labels, 1.0, -1.0)
    found = calibration.platt(truth / 7 + 3, labels)  # the log-odds are 2 * truth at equal classes
    assert found.slope == pytest.approx(14, rel=0.05)
    assert found.offset == pytest.approx(-42, rel=0.05)


def test_a_readout_that_knows_nothing_has_the_figures_of_ignorance() -> None:
    labels = torch.arange(30) < 10
    zero = torch.zeros(30, dtype=torch.float64)
    assert calibration.brier(zero, labels) == pytest.approx(0.25)
    assert calibration.cross_entropy(zero, labels) == pytest.approx(math.log(2))


def test_calibration_of_constant_scores_is_finite_and_says_nothing() -> None:
    labels = torch.arange(6) < 3
    constant = torch.full((6,), 5.0, dtype=torch.float64)
    torch.testing.assert_close(calibration.platt(constant, labels).apply(constant), torch.zeros(6).double())


def test_scores_against_the_labels_are_not_turned_around() -> None:
    labels = torch.arange(40) < 20
    scores = torch.where(labels, -1.0, 1.0).double() + torch.linspace(-0.1, 0.1, 40).double()
    found = calibration.platt(scores, labels)
    assert found.slope > 0
    assert float(found.apply(scores).abs().max()) < 0.01


def test_separable_scores_get_probabilities_inside_of_0_and_1() -> None:
    labels = torch.arange(20) < 10
    found = calibration.platt(torch.where(labels, 1.0, -1.0).double(), labels)
    highest = torch.sigmoid(found.apply(torch.tensor([1.0]).double()))
    assert float(highest) == pytest.approx(11 / 12, abs=1e-3)


def test_a_calibration_curve_counts_each_example_once_and_weighs_the_classes_the_same() -> None:
    labels = torch.tensor([True, False, False, False])
    bins = calibration.curve(torch.full((4,), 1.0, dtype=torch.float64), labels)
    assert [each.examples for each in bins] == [4]
    assert bins[0].positive == pytest.approx(0.5)
    assert bins[0].probability == pytest.approx(1 / (1 + math.exp(-1)))
