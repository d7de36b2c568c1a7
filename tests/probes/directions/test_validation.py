"""Validating: scores on examples that a direction was not made from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from probes.capture.spill import Spill
from probes.data.splits import FOLDS
from probes.directions import validation
from probes.directions.evidence import evidence_by_fold, evidence_of, evidence_of_others
from probes.directions.methods import method, methods, scaled
from probes.directions.validation import Validation, draw, held_out_scores, validate
from probes.intervals import auroc


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(positive: int, negative: int) -> Tensor:
    return torch.arange(positive + negative) < positive


def even_folds(positive: int, negative: int) -> Tensor:
    return torch.cat([torch.arange(positive) % FOLDS, torch.arange(negative) % FOLDS])


def validated(name: str, rows: Tensor, labels: Tensor, *, seed: int = 0, paired: bool = False) -> Validation:
    fold = even_folds(int(labels.sum()), int((~labels).sum()))
    return validate(method(name), rows, labels, fold, draw(labels, fold, seed), paired=paired)


# Held-out scores


@pytest.mark.parametrize("counts", [(5, 5), (40, 12), (12, 40)], ids=str)
def test_perfect_separation_of_a_few_examples_is_no_certainty(counts: tuple[int, int]) -> None:
    labels = labels_of(*counts)
    for sign in (1.0, -1.0):
        rows = normal(sum(counts), 3) + 1e3 * labels[:, None]
        rows[labels] *= sign
        found = validated("diffmean", rows, labels)
        assert found.auroc == 1.0
        assert found.auroc_high == 1.0
        assert found.auroc_low == pytest.approx(0.025 ** (1 / min(counts)))


def test_examples_of_a_group_count_once_in_the_interval() -> None:
    """Eight groups whose level differs more than their classes do."""
    labels, groups = labels_of(40, 40), [f"g{i % 8}" for i in range(80)]
    rows = normal(80, 3) + 2.0 * labels[:, None] + 2.0 * normal(8, 1, seed=1).repeat(10, 1)
    fold = even_folds(40, 40)
    plain = validate(method("diffmean"), rows, labels, fold, draw(labels, fold, 0), paired=False)
    grouped = validate(method("diffmean"), rows, labels, fold, draw(labels, fold, 0, groups), paired=False)
    assert grouped.auroc == plain.auroc
    assert (grouped.auroc_low, grouped.auroc_high) != (plain.auroc_low, plain.auroc_high)
    separated = rows + 1e3 * labels[:, None]
    found = validate(method("diffmean"), separated, labels, fold, draw(labels, fold, 0, groups), paired=False)
    assert found.auroc_low == pytest.approx(0.025 ** (1 / 8))


@pytest.mark.parametrize("name", methods())
def test_a_score_is_made_without_the_example_that_it_judges(name: str) -> None:
    rows, labels, fold = normal(40, 6).float(), labels_of(20, 20), even_folds(20, 20)
    rows[labels] += 1.0
    scores = held_out_scores(method(name), rows, labels, fold, paired=False)
    changed = rows.clone()
    changed[fold == 2] *= -3.0
    others = held_out_scores(method(name), changed, labels, fold, paired=False)
    direction_of_the_rest = evidence_of(method(name).NEEDS, rows[fold != 2], labels[fold != 2], False)
    unit = scaled(method(name).direction(direction_of_the_rest), direction_of_the_rest)
    unit = unit / unit.norm()
    middle = (direction_of_the_rest.positive.mean + direction_of_the_rest.negative.mean) / 2
    expected = (changed[fold == 2].double() - middle) @ unit
    torch.testing.assert_close(others[fold == 2], expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(scores[fold != 2], others[fold != 2])  # those do see the rows that changed


@pytest.mark.parametrize("name", methods())
def test_noise_is_not_separated_on_held_out_examples_though_it_is_in_sample(name: str) -> None:
    labels = labels_of(40, 40)
    held_out, in_sample = [], []
    for seed in range(8):
        rows = normal(80, 160, seed=seed).float()
        scores = held_out_scores(method(name), rows, labels, even_folds(40, 40), paired=False)
        held_out.append(auroc(scores[labels], scores[~labels]))
        evidence = evidence_of(method(name).NEEDS, rows, labels, False)
        own = rows.double() @ scaled(method(name).direction(evidence), evidence)
        in_sample.append(auroc(own[labels], own[~labels]))
    assert sum(held_out) / 8 == pytest.approx(0.5, abs=0.08)
    if name == "diffmean":
        assert min(in_sample) > 0.95
    assert sum(in_sample) / 8 > sum(held_out) / 8 + 0.1


@pytest.mark.parametrize("name", methods())
@pytest.mark.parametrize("paired", [False, True], ids=["unpaired", "paired"])
def test_a_large_common_offset_does_not_lower_the_auroc(name: str, paired: bool) -> None:
    labels = labels_of(60, 60)
    rows = normal(120, 24) + 1.2 * labels[:, None] * torch.nn.functional.normalize(torch.ones(24), dim=0) * 2
    offset = 1e3 * torch.nn.functional.normalize(normal(24, seed=5), dim=0)
    plain, moved = (
        validated(name, rows.float(), labels, paired=paired),
        validated(name, (rows + offset).float(), labels, paired=paired),
    )
    assert plain.auroc > 0.9
    assert moved.auroc == pytest.approx(plain.auroc, abs=0.005)
    assert moved.cohens_d == pytest.approx(plain.cohens_d, abs=0.02)


@pytest.mark.parametrize("name", methods())
def test_classes_that_differ_are_told_apart_and_shuffled_ones_are_not(name: str) -> None:
    labels = labels_of(60, 40)
    rows = normal(100, 16).float()
    rows[labels] += 1.0
    found = validated(name, rows, labels)
    assert found.auroc_low <= found.auroc <= found.auroc_high <= 1.0
    assert found.auroc > 0.95
    assert found.auroc_low > 0.9
    assert found.cohens_d > 2
    assert found.auroc_shuffled == pytest.approx(0.5, abs=0.15)
    assert abs(found.cohens_d_shuffled) < 0.6


@pytest.mark.parametrize("name", methods())
def test_a_validation_follows_from_the_seed_and_leaves_the_global_one_alone(name: str) -> None:
    labels = labels_of(20, 15)
    rows = normal(35, 8).float()
    state = torch.get_rng_state()
    first = validated(name, rows, labels, seed=1)
    torch.rand(3)
    assert validated(name, rows, labels, seed=1) == first
    assert validated(name, rows, labels, seed=2) != first
    torch.set_rng_state(state)
    validated(name, rows, labels)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", methods())
def test_activations_that_are_all_the_same_are_told_apart_by_nothing(name: str) -> None:
    found = validated(name, torch.full((20, 4), 3.0), labels_of(10, 10))
    assert found == Validation(0.5, 0.5, 0.5, 0.5, 0.0, 0.0)


def test_one_fold_is_no_validation() -> None:
    labels = labels_of(3, 1)
    fold = torch.zeros(4, dtype=torch.int64)
    found = validate(method("diffmean"), normal(4, 3).float(), labels, fold, draw(labels, fold, 0), paired=False)
    assert all(math.isnan(value) for value in found)


def test_pairs_take_what_their_prompts_share_out_of_the_validation() -> None:
    labels = labels_of(50, 50)
    prompts = 8.0 * normal(50, 24, seed=1) * torch.linspace(0.1, 1.0, 24)
    direction = torch.nn.functional.normalize(normal(24, seed=2), dim=0)
    rows = (normal(100, 24) + prompts.repeat(2, 1) + 4.0 * labels[:, None] * direction).float()
    with_pairs, without = (
        held_out_scores(method("pca"), rows, labels, even_folds(50, 50), paired=p) for p in (True, False)
    )
    assert auroc(with_pairs[labels], with_pairs[~labels]) > auroc(without[labels], without[~labels]) + 0.1


# Streaming


@pytest.mark.parametrize("name", methods())
@pytest.mark.parametrize("paired", [False, True], ids=["unpaired", "paired"])
def test_a_layer_read_in_pieces_is_judged_as_one_read_at_once(
    name: str, paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, fold = labels_of(30, 30), even_folds(30, 30)
    rows = (normal(60, 6) + 1e2 + labels[:, None]).float()
    at_once = validated(name, rows, labels, paired=paired)
    sizes: list[int] = []
    read = Spill.read

    def watched(spill: Spill, layer: int, start: int = 0, stop: int | None = None) -> Tensor:
        found = read(spill, layer, start, stop)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(Spill, "read", watched)
    monkeypatch.setattr("probes.directions.evidence.CHUNK", 7 * 6)
    monkeypatch.setattr(validation, "CHUNK", 7 * 6)
    with Spill(2, 60, 6, 0) as spill:
        spill.write(1, range(60), rows)
        in_pieces = validate(method(name), spill.layer(1), labels, fold, draw(labels, fold, 0), paired=paired)
        assert in_pieces == pytest.approx(at_once, rel=1e-9)
        evidence = evidence_of(method(name).NEEDS, spill.layer(1), labels, paired)
        torch.testing.assert_close(
            method(name).direction(evidence),
            method(name).direction(evidence_of(method(name).NEEDS, rows, labels, paired)),
        )
    if method(name).NEEDS != "activations":
        assert max(sizes) <= 7 * 6


def test_a_method_is_given_the_moments_that_it_needs_and_no_others() -> None:
    rows, labels, fold = normal(20, 3), labels_of(10, 10), even_folds(10, 10)
    for name, paired, scatter, differences in (
        ("diffmean", True, False, False),
        ("whitened", True, True, False),
        ("pca", True, False, True),
        ("pca", False, True, False),
    ):
        for found in evidence_by_fold(method(name).NEEDS, rows, labels, fold, paired):
            assert (found.positive.scatter is not None) == (found.negative.scatter is not None) == scatter
            assert (found.differences is not None) == differences
            assert found.positive.count == found.negative.count == 2


@pytest.mark.parametrize("name", methods())
@pytest.mark.parametrize("paired", [False, True], ids=["unpaired", "paired"])
def test_the_evidence_of_the_other_folds_is_that_of_their_rows(name: str, paired: bool) -> None:
    labels, fold = labels_of(25, 25), even_folds(25, 25)
    rows = normal(50, 6) + 1e3 + labels[:, None]
    for f, found in enumerate(evidence_of_others(method(name).NEEDS, rows, labels, fold, paired)):
        expected = evidence_of(method(name).NEEDS, rows[fold != f], labels[fold != f], paired)
        assert (found.positive.count, found.negative.count) == (expected.positive.count, expected.negative.count)
        for mine, slow in (
            (found.positive.mean, expected.positive.mean),
            (found.negative.mean, expected.negative.mean),
            (method(name).direction(found), method(name).direction(expected)),
        ):
            torch.testing.assert_close(mine, slow, rtol=1e-9, atol=1e-9)
