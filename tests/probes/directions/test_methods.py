"""Extraction methods: every one finds a direction that was planted, where careless ones fail."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probes.directions.evidence import Evidence, evidence_of
from probes.directions.methods import method, methods, scaled
from probes.directions.methods.logistic import fit
from probes.directions.methods.pca import leading_eigenvector
from probes.directions.methods.whitened import shrunk
from vectors.errors import ExampleError, UsageError

HIDDEN = 32
SHIFT = 6.0  # between the classes' means, in standard deviations of the noise along any direction

EVERY = pytest.mark.parametrize("name", methods())


def unit(seed: int, hidden: int = HIDDEN) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(hidden, generator=generator, dtype=torch.float64), dim=0)


def planted(
    positive: int,
    negative: int,
    *,
    direction: Tensor | None = None,
    scale: Tensor | None = None,
    offset: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 rows of two classes whose means are `SHIFT` apart along a direction [hidden], and that direction.

    The noise is normal, of deviation `scale` by coordinate (1 by default); `offset`, in shifts, is common to all.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = unit(seed + 1) if direction is None else direction
    common = offset * SHIFT * unit(seed + 2, len(direction))
    noise = torch.randn(positive + negative, len(direction), generator=generator, dtype=torch.float64)
    rows = common + noise * (1.0 if scale is None else scale)
    rows[:positive] += SHIFT * direction
    return rows[:positive].float(), rows[positive:].float(), direction


def extracted(name: str, positive: Tensor, negative: Tensor, *, paired: bool = False) -> Tensor:
    """The vector of strength 1, as an extraction makes it."""
    evidence = seen(method(name), positive, negative, paired)
    return scaled(method(name).direction(evidence), evidence)


def seen(chosen: ModuleType, positive: Tensor, negative: Tensor, paired: bool = False) -> Evidence:
    rows = torch.cat([positive, negative])
    return evidence_of(chosen.NEEDS, rows, torch.arange(len(rows)) < len(positive), paired)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


# Every method


@EVERY
def test_a_method_says_what_it_is_where_it_is_from_and_what_it_needs(name: str) -> None:
    chosen = method(name)
    assert chosen.SUMMARY
    assert chosen.SOURCE
    assert chosen.NEEDS in ("means", "second moments", "pair moments", "activations")
    assert chosen.__doc__
    assert chosen.direction.__doc__


@EVERY
@pytest.mark.parametrize("offset", [0.0, 1e3], ids=["centred", "offset"])
@pytest.mark.parametrize("counts", [(400, 400), (600, 150), (150, 600)], ids=str)
def test_every_method_recovers_a_planted_direction(name: str, counts: tuple[int, int], offset: float) -> None:
    positive, negative, direction = planted(*counts, offset=offset)
    assert cosine(extracted(name, positive, negative), direction) > 0.99


@EVERY
@pytest.mark.parametrize("offset", [0.0, 1e3], ids=["centred", "offset"])
def test_every_method_recovers_a_planted_direction_from_pairs(name: str, offset: float) -> None:
    positive, negative, direction = planted(400, 400, offset=offset)
    # What a prompt adds to both of its completions is no part of the behaviour.
    prompts = 2 * torch.randn(400, HIDDEN, generator=torch.Generator().manual_seed(9))
    assert cosine(extracted(name, positive + prompts, negative + prompts, paired=True), direction) > 0.98
    assert cosine(extracted(name, positive, negative, paired=True), direction) > 0.99


@EVERY
def test_strength_one_along_the_direction_is_the_mean_displacement(name: str) -> None:
    positive, negative, _ = planted(120, 60, offset=10.0)
    vector = extracted(name, positive, negative)
    displacement = positive.double().mean(0) - negative.double().mean(0)
    torch.testing.assert_close(vector @ vector, displacement @ vector, rtol=1e-9, atol=0.0)
    assert float(displacement @ vector) > 0


@EVERY
def test_exchanging_the_classes_turns_the_vector_around(name: str) -> None:
    positive, negative, _ = planted(120, 60)
    there, back = extracted(name, positive, negative), extracted(name, negative, positive)
    torch.testing.assert_close(there, -back, rtol=1e-6, atol=1e-6)


@EVERY
@pytest.mark.parametrize("factor", [2.0**-10, 2.0**10])
def test_the_vector_grows_as_the_activations_do(name: str, factor: float) -> None:
    positive, negative, _ = planted(120, 60)
    plain, grown = extracted(name, positive, negative), extracted(name, positive * factor, negative * factor)
    torch.testing.assert_close(grown, plain * factor, rtol=1e-5, atol=1e-6 * factor)


@EVERY
def test_the_order_of_the_examples_does_not_matter(name: str) -> None:
    positive, negative, _ = planted(60, 40)
    shuffled = extracted(name, positive.flip(0), negative.flip(0))
    torch.testing.assert_close(shuffled, extracted(name, positive, negative), rtol=1e-8, atol=1e-8)


@EVERY
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_classes_with_equal_means_are_an_error(name: str, offset: float) -> None:
    positive, _, _ = planted(30, 1, offset=offset)
    with pytest.raises(ExampleError, match="same mean activation"):
        extracted(name, positive, positive.flip(0))


@EVERY
@pytest.mark.parametrize("counts", [(1, 1), (7, 4), (1, 4)], ids=str)
def test_examples_without_any_spread_give_the_mean_displacement(name: str, counts: tuple[int, int]) -> None:
    high, low = 5 * unit(1).float(), 7 * unit(2).float()
    vector = extracted(name, high.repeat(counts[0], 1), low.repeat(counts[1], 1))
    torch.testing.assert_close(vector, (high - low).double(), rtol=1e-6, atol=1e-6)


@EVERY
def test_a_few_examples_in_many_dimensions_give_a_finite_vector_to_the_right_side(name: str) -> None:
    direction = unit(1, 256)
    positive, negative, _ = planted(3, 2, direction=direction)
    vector = extracted(name, positive, negative)
    assert bool(torch.isfinite(vector).all())
    assert cosine(vector, direction) > 0.1


@EVERY
def test_a_coordinate_that_is_constant_has_no_part_in_the_vector(name: str) -> None:
    positive, negative, direction = planted(600, 150)
    positive[:, 3] = negative[:, 3] = 1e4
    without = direction.clone()
    without[3] = 0.0
    vector = extracted(name, positive, negative)
    assert cosine(vector, without) > 0.99
    assert abs(float(vector[3])) < 1e-6


def test_an_unknown_method_is_a_wrong_use_that_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="there is no extraction method 'diffmeans'") as caught:
        method("diffmeans")
    assert "did you mean diffmean?" in caught.value.hint
    assert all(name in caught.value.hint for name in methods())


# Scaling


@given(factor=st.floats(1e-30, 1e30), sign=st.sampled_from([1, -1]))
def test_length_and_sign_of_a_direction_do_not_matter(factor: float, sign: int) -> None:
    positive, negative, direction = planted(20, 10)
    evidence = seen(method("diffmean"), positive, negative)
    expected = scaled(direction, evidence)
    torch.testing.assert_close(scaled(sign * factor * direction, evidence), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_direction_that_is_none_is_an_error(value: float) -> None:
    positive, negative, direction = planted(20, 10)
    with pytest.raises(ExampleError):
        scaled(direction * value, seen(method("diffmean"), positive, negative))


def test_a_direction_across_the_displacement_is_an_error() -> None:
    positive, negative = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    with pytest.raises(ExampleError):
        scaled(torch.tensor([0.0, 1.0]).double(), seen(method("diffmean"), positive, negative))


# diffmean, whitened


def test_diffmean_is_the_difference_of_the_means() -> None:
    positive, negative, _ = planted(30, 20)
    expected = positive.double().mean(0) - negative.double().mean(0)
    torch.testing.assert_close(extracted("diffmean", positive, negative), expected)


def test_whitened_finds_a_direction_that_strong_noise_elsewhere_hides_from_the_means() -> None:
    scale = torch.ones(HIDDEN, dtype=torch.float64)
    scale[: HIDDEN // 2] = 30.0
    direction = torch.zeros(HIDDEN, dtype=torch.float64)
    direction[HIDDEN // 2 :] = unit(1, HIDDEN // 2)
    positive, negative, _ = planted(600, 150, direction=direction, scale=scale, offset=1e3)
    assert cosine(extracted("diffmean", positive, negative), direction) < 0.9
    assert cosine(extracted("whitened", positive, negative), direction) > 0.99


def test_whitened_is_fishers_discriminant_where_examples_abound() -> None:
    scale = torch.linspace(0.5, 3.0, HIDDEN).double()
    positive, negative, direction = planted(4_000, 4_000, scale=scale)
    assert cosine(extracted("whitened", positive, negative), direction / scale**2) > 0.99


def test_the_shrunk_covariance_lies_between_the_sample_and_a_multiple_of_the_identity() -> None:
    rows = planted(40, 1)[0].double()
    covariance = torch.cov(rows.T, correction=0)
    target = torch.eye(HIDDEN).double() * covariance.trace() / HIDDEN
    found = shrunk(covariance, 40)
    share = (covariance - found)[0, 1] / covariance[0, 1]
    assert 0 < float(share) < 1
    torch.testing.assert_close(found, (1 - share) * covariance + share * target, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.trace(), covariance.trace(), rtol=1e-6, atol=0.0)


def test_few_samples_are_shrunk_more_than_many() -> None:
    covariance = torch.cov(planted(200, 1, scale=torch.linspace(0.5, 3.0, HIDDEN).double())[0].double().T)
    few, many = (float(shrunk(covariance, count)[0, 1] / covariance[0, 1]) for count in (5, 500))
    assert few < many < 1


def test_a_multiple_of_the_identity_is_left_alone() -> None:
    identity = 3.0 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(shrunk(identity, 10), identity, rtol=1e-8, atol=0.0)


# pca


def test_centring_the_differences_would_lose_the_direction() -> None:
    positive, negative, direction = planted(400, 400)
    differences = seen(method("pca"), positive, negative, paired=True).differences
    assert differences is not None
    assert differences.scatter is not None
    centred = torch.linalg.eigh(differences.scatter).eigenvectors[:, -1]
    assert abs(cosine(centred, direction)) < 0.7
    assert cosine(extracted("pca", positive, negative, paired=True), direction) > 0.99


@pytest.mark.parametrize("counts", [(30, 30), (40, 15)], ids=str)
def test_pca_without_pairs_is_that_of_every_positive_with_every_negative(counts: tuple[int, int]) -> None:
    positive, negative, _ = planted(*counts, scale=torch.linspace(1.0, 4.0, HIDDEN).double())
    every = (positive.double()[:, None] - negative.double()[None]).flatten(0, 1)
    leading = torch.linalg.eigh(every.T @ every).eigenvectors[:, -1]
    assert abs(cosine(extracted("pca", positive, negative), leading)) > 1 - 1e-9


def test_pca_with_pairs_is_that_of_the_differences() -> None:
    positive, negative, _ = planted(40, 40, scale=torch.linspace(1.0, 4.0, HIDDEN).double())
    differences = (positive - negative).double()
    leading = torch.linalg.eigh(differences.T @ differences).eigenvectors[:, -1]
    assert abs(cosine(extracted("pca", positive, negative, paired=True), leading)) > 1 - 1e-9


@pytest.mark.parametrize("gap", [0.5, 1e-3, 1e-6])
def test_the_leading_eigenvector_is_found_whatever_the_gap_to_the_next(gap: float) -> None:
    basis = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).double()).Q
    values = torch.linspace(0.1, 1.0, 12).double()
    values[-1] = 1.0 + gap
    moment = basis * values @ basis.T
    found = leading_eigenvector(moment, basis.sum(1))
    assert abs(cosine(found, basis[:, -1])) > 1 - 1e-9


# logistic


def reference(rows: Tensor, labels: Tensor, weights: Tensor, penalty: float) -> Tensor:
    """The optimum by a general optimiser in float64, from the definition of the loss."""
    solution = torch.zeros(rows.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [solution],
        max_iter=2_000,
        tolerance_grad=1e-11,
        tolerance_change=0.0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )
    signs = 2 * labels - 1

    def loss() -> Tensor:
        optimiser.zero_grad()
        margins = signs * (rows @ solution[:-1] + solution[-1])
        value = (weights * torch.nn.functional.softplus(-margins)).sum() + penalty * solution[:-1].square().sum() / 2
        value.backward()
        return value

    optimiser.step(loss)
    return solution.detach()


@pytest.mark.parametrize("features", [5, 20, 100], ids="{} features".format)
@pytest.mark.parametrize("penalty", [0.1, 1.0, 40.0])
@pytest.mark.parametrize("shift", [0.5, 8.0], ids=["overlapping", "separable"])
def test_newton_finds_the_optimum_that_a_general_optimiser_finds(features: int, penalty: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(features)
    rows = torch.randn(40, features, generator=generator, dtype=torch.float64)
    labels = (torch.arange(40) < 12).double()
    rows[:12] += shift * unit(3, features)
    weights = torch.where(labels > 0, 40 / 24, 40 / 56).double()
    found = torch.cat([part.reshape(-1) for part in fit(rows, labels, weights, penalty)])
    torch.testing.assert_close(found, reference(rows, labels, weights, penalty), rtol=1e-6, atol=1e-6)


def test_logistic_is_mapped_back_from_standardised_space() -> None:
    scale = torch.logspace(-3, 3, HIDDEN).double()
    normal = unit(1)  # in standardised space
    positive, negative, _ = planted(600, 150, direction=normal * scale, scale=scale)
    vector = extracted("logistic", positive, negative)
    assert cosine(vector * scale, normal) > 0.99  # w / deviation, seen in standardised space, is w
    assert cosine(vector, normal) < 0.9  # w itself, as if it lay in activation space, is another direction
    assert cosine(vector, normal / scale) > 0.99


def test_logistic_does_not_care_for_the_units_of_a_coordinate() -> None:
    positive, negative, _ = planted(60, 30)
    units = torch.logspace(-2, 2, HIDDEN)
    chosen = method("logistic")
    plain = chosen.direction(seen(chosen, positive, negative))
    other = chosen.direction(seen(chosen, positive * units, negative * units))
    torch.testing.assert_close(other * units, plain, rtol=1e-4, atol=1e-6)


def test_a_class_repeated_does_not_tilt_the_logistic_direction() -> None:
    positive, negative, _ = planted(60, 60)
    chosen = method("logistic")
    once = chosen.direction(seen(chosen, positive, negative))
    often = chosen.direction(seen(chosen, positive, negative.repeat(9, 1)))
    assert cosine(once, often) > 0.995
