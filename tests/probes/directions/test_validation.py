"""Judging: scores on examples that a direction was not made from, with an interval that holds what it says."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from probes.capture.spill import Spill
from probes.data.examples import Example
from probes.directions import validation
from probes.directions.evidence import evidence_by_fold, evidence_of, evidence_of_others
from probes.directions.methods import method, methods, scaled
from probes.directions.validation import (
    CONFIDENCE,
    FOLDS,
    RESAMPLES,
    Judgement,
    auroc,
    cohens_d,
    draw,
    draw_resamples,
    folds,
    held_out_scores,
    interval,
    provable,
    shuffle_within,
)

SCORES = st.lists(st.integers(-4, 4), min_size=1, max_size=12)  # few values, so that ties are common


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(positive: int, negative: int) -> Tensor:
    return torch.arange(positive + negative) < positive


def even_folds(positive: int, negative: int) -> Tensor:
    return torch.cat([torch.arange(positive) % FOLDS, torch.arange(negative) % FOLDS])


def pairwise_auroc(positive: Tensor, negative: Tensor) -> float:
    """The definition: how often a positive lies above a negative, ties counted half."""
    above = (positive[:, None] > negative[None]).double() + (positive[:, None] == negative[None]).double() / 2
    return float(above.mean())


def judged(name: str, rows: Tensor, labels: Tensor, *, seed: int = 0, paired: bool = False) -> Judgement:
    fold = even_folds(int(labels.sum()), int((~labels).sum()))
    return validation.judge(method(name), rows, labels, fold, draw(labels, fold, seed), paired=paired)


# AUROC and its interval


@given(positive=SCORES, negative=SCORES)
def test_auroc_is_the_share_of_pairs_in_the_right_order(positive: list[int], negative: list[int]) -> None:
    above, below = torch.tensor(positive).double(), torch.tensor(negative).double()
    assert auroc(above, below) == pytest.approx(pairwise_auroc(above, below), abs=1e-12)
    assert auroc(above, below) + auroc(below, above) == pytest.approx(1.0, abs=1e-12)


def test_auroc_of_scores_that_are_all_the_same_is_a_half() -> None:
    assert auroc(torch.ones(5), torch.ones(3)) == 0.5
    assert auroc(torch.ones(5), torch.zeros(3)) == 1.0
    assert auroc(torch.zeros(5), torch.ones(3)) == 0.0


@given(positive=SCORES, negative=SCORES, seed=st.integers(0, 5))
@settings(max_examples=15)
def test_the_interval_is_that_of_a_bootstrap_that_sorts_every_resample(
    positive: list[int], negative: list[int], seed: int
) -> None:
    scores = torch.tensor(positive + negative).double()
    labels = labels_of(len(positive), len(negative))
    counts = draw_resamples(labels, seed)
    values = []
    for drawn in counts.long():
        above = scores[labels].repeat_interleave(drawn[labels])
        below = scores[~labels].repeat_interleave(drawn[~labels]).sort().values
        ties_and_wins = torch.searchsorted(below, above) + torch.searchsorted(below, above, right=True)
        values.append(float(ties_and_wins.sum()) / 2 / len(above) / len(below))
    tail = (1 - CONFIDENCE) / 2
    slow = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    assert interval(scores, labels, counts) == tuple(slow.tolist())


def test_the_interval_does_not_depend_on_how_resamples_are_cut_into_pieces() -> None:
    scores, labels = normal(9_000), labels_of(5_000, 4_000)
    counts = draw_resamples(labels, 0)  # several pieces
    low, high = interval(scores, labels, counts)
    chosen = torch.randperm(9_000, generator=torch.Generator().manual_seed(1))
    assert interval(scores[chosen], labels[chosen], counts[:, chosen]) == (low, high)
    assert low < auroc(scores[labels], scores[~labels]) < high


def test_the_interval_covers_the_true_auroc_as_often_as_it_says() -> None:
    distance, each, rounds = 1.0, 40, 200
    truth = 0.5 * (1 + math.erf(distance / 2))  # Phi(d / sqrt 2) for two normals of deviation 1
    labels = labels_of(each, each)
    covered = 0
    for seed in range(rounds):
        low, high = interval(normal(2 * each, seed=seed) + distance * labels, labels, draw_resamples(labels, seed))
        covered += low <= truth <= high
    assert 0.88 <= covered / rounds <= 0.99


def test_an_interval_of_perfectly_separated_classes_is_a_point() -> None:
    labels = labels_of(6, 4)
    assert interval(labels.double(), labels, draw_resamples(labels, 0)) == (1.0, 1.0)


@pytest.mark.parametrize("counts", [(5, 5), (40, 12), (12, 40)], ids=str)
def test_perfect_separation_of_a_few_examples_is_no_certainty(counts: tuple[int, int]) -> None:
    labels = labels_of(*counts)
    for sign in (1.0, -1.0):
        rows = normal(sum(counts), 3) + 1e3 * labels[:, None]
        rows[labels] *= sign
        found = judged("diffmean", rows, labels)
        assert found.auroc == 1.0
        assert found.auroc_high == 1.0
        assert found.auroc_low == pytest.approx(0.025 ** (1 / min(counts)))


def test_the_bound_of_separated_classes_is_exact() -> None:
    """With this share of the rarer class on the wrong side, just 2.5 % of draws show none of it."""
    least, greatest = provable(12, 40)
    assert greatest**12 == pytest.approx(0.025)
    assert least == pytest.approx(1 - greatest)
    assert provable(10**6, 10**6)[1] > 0.99999


def test_resamples_draw_each_class_apart_and_follow_from_the_seed() -> None:
    labels = torch.tensor([True, False, True, False, False])
    counts = draw_resamples(labels, 3)
    assert counts.shape == (RESAMPLES, 5)
    assert set(counts[:, labels].sum(1).tolist()) == {2.0}
    assert set(counts[:, ~labels].sum(1).tolist()) == {3.0}
    assert torch.equal(counts, draw_resamples(labels, 3))
    assert not torch.equal(counts, draw_resamples(labels, 4))
    # Each example is drawn as often as any other.
    assert (counts.double().mean(0) - 1).abs().max() < 0.1


# Cohen's d


def test_cohens_d_is_its_closed_form() -> None:
    positive, negative = torch.tensor([3.0, 5.0, 7.0]).double(), torch.tensor([0.0, 2.0]).double()
    pooled = math.sqrt((2 * 4.0 + 1 * 2.0) / (3 + 2 - 2))  # variances 4 and 2
    assert cohens_d(positive, negative) == pytest.approx((5.0 - 1.0) / pooled, rel=1e-12)
    assert cohens_d(negative, positive) == pytest.approx(-cohens_d(positive, negative), rel=1e-12)


@given(factor=st.floats(1e-3, 1e3), offset=st.floats(-1e3, 1e3))
def test_cohens_d_has_no_unit(factor: float, offset: float) -> None:
    a, b = normal(9, seed=1) + 1, normal(7, seed=2)
    assert cohens_d(a * factor + offset, b * factor + offset) == pytest.approx(cohens_d(a, b), rel=1e-6)


def test_cohens_d_without_any_spread_is_no_number_out_of_bounds() -> None:
    assert cohens_d(torch.ones(3), torch.ones(2)) == 0.0
    assert math.isfinite(cohens_d(torch.ones(1), torch.zeros(1)))


# Folds


def examples(contexts: list[int | None], side: str) -> list[Example]:
    return [Example(f"{side} {i}", None if c is None else f"context {c}") for i, c in enumerate(contexts)]


def sizes(fold: Tensor, count: int) -> list[int]:
    return fold.bincount(minlength=count).tolist()


CONTEXTS = st.lists(st.integers(0, 11), min_size=5, max_size=40)


@given(contexts=CONTEXTS, others=CONTEXTS, seed=st.integers(0, 3))
def test_every_fold_holds_both_classes(contexts: list[int], others: list[int], seed: int) -> None:
    positive, negative = folds(examples(contexts, "yes"), examples(others, "no"), seed)
    assert positive.shape == (len(contexts),)
    assert negative.shape == (len(others),)
    assert set(positive.tolist()) == set(negative.tolist()) == set(range(FOLDS))


@given(contexts=st.lists(st.integers(0, 11), min_size=5, max_size=40, unique=True), copies=st.integers(1, 4))
def test_examples_with_the_same_context_are_never_on_both_sides(contexts: list[int], copies: int) -> None:
    yes, no = examples(contexts * copies, "yes"), examples(contexts, "no")
    seen = defaultdict(set)
    for example, fold in zip([*yes, *no], torch.cat(folds(yes, no, 0)).tolist(), strict=True):
        seen[example.context].add(fold)
    assert all(len(found) == 1 for found in seen.values())


def test_a_few_pairs_with_prompts_of_their_own_stay_together() -> None:
    for count in (2, 3, 4):
        positive, negative = folds(examples([*range(count)], "yes"), examples([*range(count)], "no"), 0)
        assert torch.equal(positive, negative)
        assert sorted(positive.tolist()) == [*range(count)]


def test_pairs_stay_together_whatever_they_share() -> None:
    one_prompt = examples([1] * 23, "yes"), examples([1] * 23, "no")
    words = examples([*[1, 2] * 8], "yes"), examples([*[3, 4] * 8], "no")  # as templates make them
    refusals = examples([*range(3)] * 5, "yes"), [Example("no", f"context {i % 3}") for i in range(15)]
    texts = examples([None] * 9, "yes"), examples([None] * 9, "no")
    for yes, no in (one_prompt, words, refusals, texts):
        positive, negative = folds(yes, no, 0, paired=True)
        assert torch.equal(positive, negative)
        assert set(positive.tolist()) == set(range(FOLDS))
        order = torch.randperm(len(yes), generator=torch.Generator().manual_seed(1)).tolist()
        moved, _ = folds([yes[i] for i in order], [no[i] for i in order], 0, paired=True)
        assert torch.equal(moved, positive[order])


@pytest.mark.parametrize("context", [None, 1], ids=["without a context", "with one for all"])
@pytest.mark.parametrize("counts", [(5, 5), (23, 41), (100, 7)], ids=str)
def test_folds_are_balanced_within_each_class(context: int | None, counts: tuple[int, int]) -> None:
    both = folds(examples([context] * counts[0], "yes"), examples([context] * counts[1], "no"), 0)
    for fold in both:
        assert max(sizes(fold, FOLDS)) - min(sizes(fold, FOLDS)) <= 1


def test_folds_of_pairs_are_balanced() -> None:
    positive, negative = folds(examples([*range(64)], "yes"), examples([*range(64)], "no"), 0)
    assert torch.equal(positive, negative)
    assert sorted(sizes(positive, FOLDS)) == [12, 13, 13, 13, 13]


def test_the_same_text_twice_is_never_on_both_sides() -> None:
    repeated = [Example(f"text {i % 10}") for i in range(30)]
    positive, _ = folds(repeated, examples([None] * 10, "no"), 0)
    for first, second in pairwise(range(0, 30, 10)):
        assert torch.equal(positive[first : first + 10], positive[second : second + 10])


@pytest.mark.parametrize("contexts", [[None] * 20, [*range(20)], [1] * 20, [1, 2] * 10, [1] * 17 + [2, 3, 4]])
def test_a_fold_follows_from_the_content_and_not_from_the_place_in_the_file(contexts: list[int | None]) -> None:
    yes, no = examples(contexts, "yes"), examples(contexts, "no")
    positive, negative = folds(yes, no, 0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist()
    moved_positive, moved_negative = folds([yes[i] for i in order], [no[i] for i in reversed(order)], 0)
    assert torch.equal(moved_positive, positive[order])
    assert torch.equal(moved_negative, negative[order[::-1]])


def test_other_seeds_give_other_folds() -> None:
    yes, no = examples([None] * 30, "yes"), examples([None] * 30, "no")
    assert not torch.equal(folds(yes, no, 0)[0], folds(yes, no, 1)[0])


def test_a_few_large_groups_are_split_rather_than_left_without_a_class() -> None:
    # Six contexts, as many as folds and one more, of which no positive has more than two.
    yes, no = examples([0, 1] * 20, "yes"), examples([2, 3, 4, 5] * 10, "no")
    for fold in folds(yes, no, 0):
        assert sizes(fold, FOLDS) == [8] * FOLDS


def test_there_are_no_more_folds_than_examples_of_a_class() -> None:
    for count in (1, 2, 4, 5, 6):
        both = folds(examples([None] * 9, "yes"), examples([None] * count, "no"), 0)
        assert all(set(fold.tolist()) == set(range(min(FOLDS, count))) for fold in both)


def test_nothing_but_repetitions_still_makes_folds_of_both_classes() -> None:
    positive, negative = folds([Example("yes")] * 7, [Example("no")] * 6, 0)
    assert set(positive.tolist()) == set(negative.tolist()) == set(range(FOLDS))


# Held-out scores


@pytest.mark.parametrize("name", methods())
def test_a_score_is_made_without_the_example_that_it_judges(name: str) -> None:
    rows, labels, fold = normal(40, 6).float(), labels_of(20, 20), even_folds(20, 20)
    rows[labels] += 1.0
    scores = held_out_scores(method(name), rows, labels, fold, paired=False)
    changed = rows.clone()
    changed[fold == 2] *= -3.0
    others = held_out_scores(method(name), changed, labels, fold, paired=False)
    direction_of_the_rest = evidence_of(method(name), rows[fold != 2], labels[fold != 2], False)
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
        evidence = evidence_of(method(name), rows, labels, False)
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
        judged(name, rows.float(), labels, paired=paired),
        judged(name, (rows + offset).float(), labels, paired=paired),
    )
    assert plain.auroc > 0.9
    assert moved.auroc == pytest.approx(plain.auroc, abs=0.005)
    assert moved.cohens_d == pytest.approx(plain.cohens_d, abs=0.02)


@pytest.mark.parametrize("name", methods())
def test_classes_that_differ_are_told_apart_and_shuffled_ones_are_not(name: str) -> None:
    labels = labels_of(60, 40)
    rows = normal(100, 16).float()
    rows[labels] += 1.0
    found = judged(name, rows, labels)
    assert found.auroc_low <= found.auroc <= found.auroc_high <= 1.0
    assert found.auroc > 0.95
    assert found.auroc_low > 0.9
    assert found.cohens_d > 2
    assert found.auroc_shuffled == pytest.approx(0.5, abs=0.15)
    assert abs(found.cohens_d_shuffled) < 0.6


@pytest.mark.parametrize("name", methods())
def test_a_judgement_follows_from_the_seed_and_leaves_the_global_one_alone(name: str) -> None:
    labels = labels_of(20, 15)
    rows = normal(35, 8).float()
    state = torch.get_rng_state()
    first = judged(name, rows, labels, seed=1)
    torch.rand(3)
    assert judged(name, rows, labels, seed=1) == first
    assert judged(name, rows, labels, seed=2) != first
    torch.set_rng_state(state)
    judged(name, rows, labels)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", methods())
def test_activations_that_are_all_the_same_are_told_apart_by_nothing(name: str) -> None:
    found = judged(name, torch.full((20, 4), 3.0), labels_of(10, 10))
    assert found == Judgement(0.5, 0.5, 0.5, 0.5, 0.0, 0.0)


def test_one_fold_is_no_judgement() -> None:
    labels = labels_of(3, 1)
    fold = torch.zeros(4, dtype=torch.int64)
    found = validation.judge(
        method("diffmean"), normal(4, 3).float(), labels, fold, draw(labels, fold, 0), paired=False
    )
    assert all(math.isnan(value) for value in found)


def test_pairs_take_what_their_prompts_share_out_of_the_judgement() -> None:
    labels = labels_of(50, 50)
    prompts = 8.0 * normal(50, 24, seed=1) * torch.linspace(0.1, 1.0, 24)
    direction = torch.nn.functional.normalize(normal(24, seed=2), dim=0)
    rows = (normal(100, 24) + prompts.repeat(2, 1) + 4.0 * labels[:, None] * direction).float()
    with_pairs, without = (
        held_out_scores(method("pca"), rows, labels, even_folds(50, 50), paired=p) for p in (True, False)
    )
    assert auroc(with_pairs[labels], with_pairs[~labels]) > auroc(without[labels], without[~labels]) + 0.1


def test_shuffling_keeps_the_number_of_positives_in_each_fold() -> None:
    labels, fold = labels_of(31, 22), even_folds(31, 22)
    shuffled = shuffle_within(labels, fold, 1)
    assert not torch.equal(shuffled, labels)
    for f in range(FOLDS):
        assert int(shuffled[fold == f].sum()) == int(labels[fold == f].sum())
    assert torch.equal(shuffled, shuffle_within(labels, fold, 1))
    assert not torch.equal(shuffled, shuffle_within(labels, fold, 2))


# Streaming


@pytest.mark.parametrize("name", methods())
@pytest.mark.parametrize("paired", [False, True], ids=["unpaired", "paired"])
def test_a_layer_read_in_pieces_is_judged_as_one_read_at_once(
    name: str, paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, fold = labels_of(30, 30), even_folds(30, 30)
    rows = (normal(60, 6) + 1e2 + labels[:, None]).float()
    at_once = judged(name, rows, labels, paired=paired)
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
        in_pieces = validation.judge(method(name), spill.layer(1), labels, fold, draw(labels, fold, 0), paired=paired)
        assert in_pieces == pytest.approx(at_once, rel=1e-9)
        evidence = evidence_of(method(name), spill.layer(1), labels, paired)
        torch.testing.assert_close(
            method(name).direction(evidence), method(name).direction(evidence_of(method(name), rows, labels, paired))
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
        for found in evidence_by_fold(method(name), rows, labels, fold, paired):
            assert (found.positive.scatter is not None) == (found.negative.scatter is not None) == scatter
            assert (found.differences is not None) == differences
            assert found.positive.count == found.negative.count == 2


@pytest.mark.parametrize("name", methods())
@pytest.mark.parametrize("paired", [False, True], ids=["unpaired", "paired"])
def test_the_evidence_of_the_other_folds_is_that_of_their_rows(name: str, paired: bool) -> None:
    labels, fold = labels_of(25, 25), even_folds(25, 25)
    rows = normal(50, 6) + 1e3 + labels[:, None]
    for f, found in enumerate(evidence_of_others(method(name), rows, labels, fold, paired)):
        expected = evidence_of(method(name), rows[fold != f], labels[fold != f], paired)
        assert (found.positive.count, found.negative.count) == (expected.positive.count, expected.negative.count)
        for mine, slow in (
            (found.positive.mean, expected.positive.mean),
            (found.negative.mean, expected.negative.mean),
            (method(name).direction(found), method(name).direction(expected)),
        ):
            torch.testing.assert_close(mine, slow, rtol=1e-9, atol=1e-9)
