"""Controls: shuffled labels."""

from __future__ import annotations

import torch

from probes.controls import shuffle_within, shuffles


def test_shuffling_keeps_the_number_of_positives_in_each_fold() -> None:
    labels, fold = torch.arange(53) < 31, torch.cat([torch.arange(31) % 5, torch.arange(22) % 5])
    shuffled = shuffle_within(labels, fold, 1)
    assert not torch.equal(shuffled, labels)
    for f in range(5):
        assert int(shuffled[fold == f].sum()) == int(labels[fold == f].sum())
    assert torch.equal(shuffled, shuffle_within(labels, fold, 1))
    assert not torch.equal(shuffled, shuffle_within(labels, fold, 2))


def test_several_shuffles_follow_from_the_seed_and_differ() -> None:
    labels, fold = torch.arange(40) < 20, torch.arange(40) % 2
    first, second = shuffles(labels, fold, 3, 2)
    assert not torch.equal(first, second)
    assert torch.equal(shuffles(labels, fold, 3, 2)[1], second)
