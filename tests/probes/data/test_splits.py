"""Splits follow from content: what belongs together stays together, and no fold lacks a class."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probes.data.examples import Example
from probes.data.splits import FOLDS, HELD_OUT_MOST, folds, held_out_split


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


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (10, 1), (40, 4), (5000, HELD_OUT_MOST)])
def test_a_share_is_held_out_by_digest_whatever_the_order(count: int, held_out: int) -> None:
    digests = [f"{i * 7919 % 100003:06d}" for i in range(count)]
    train, held = held_out_split(digests)
    assert len(held) == held_out
    assert sorted([*train, *held]) == list(range(count))
    _, other = held_out_split(digests[::-1])
    assert {digests[i] for i in held} == {digests[::-1][i] for i in other}


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_examples_of_a_group_and_copies_are_never_on_both_sides(seed: int, paired: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups, others = torch.randint(12, (2, 60), generator=generator).tolist()
    # Some have no group, and every twentieth text is a copy of the one before it, in another group.
    yes, no = (
        [
            Example(f"{side} {i - (i % 20 == 1)}", "the prompt" if paired else None, group=f"g{g}" if g else "")
            for i, g in enumerate(each)
        ]
        for side, each in (("yes", groups), ("no", groups if paired else others))
    )
    seen = defaultdict(set)
    for example, fold in zip([*yes, *no], torch.cat(folds(yes, no, 0, paired)).tolist(), strict=True):
        seen[example.completion].add(fold)
        seen[example.group or example.completion].add(fold)
    assert all(len(found) == 1 for found in seen.values())


def test_groups_that_are_too_few_for_five_folds_make_fewer() -> None:
    yes = [Example(f"yes {i}", group=f"g{i % 3}") for i in range(12)]
    no = [Example(f"no {i}", group=f"g{i % 3}") for i in range(12)]
    positive, negative = folds(yes, no, 0)
    assert set(positive.tolist()) == {0, 1, 2}
    for g in range(3):
        assert len({*positive[g::3].tolist(), *negative[g::3].tolist()}) == 1
