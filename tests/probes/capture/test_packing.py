"""Packs: every sequence is spelled by its path, every shared token is stored once, and budgets hold."""

from __future__ import annotations

from itertools import pairwise, takewhile
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from probes.capture.packing import STRETCH, Pack, common_prefix, packs, passes

# Few letters and repeated sequences, so that prefixes, duplicates and sequences inside others are common.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12).flatmap(
    lambda found: st.lists(st.sampled_from(found), min_size=1, max_size=16)
)
BUDGETS = st.integers(1, 24)
UNLIMITED = 10**9


def trie(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    """The nodes of the prefix tree, each as the path that leads to it."""
    return {tuple(sequence[: i + 1]) for sequence in sequences for i in range(len(sequence))}


@given(SEQUENCES, BUDGETS)
def test_every_sequence_is_spelled_by_its_path_in_one_pack(sequences: list[list[int]], budget: int) -> None:
    found = packs(sequences, budget)
    assert sorted(index for pack in found for index in pack.paths) == list(range(len(sequences)))
    for pack in found:
        for index, path in pack.paths.items():
            assert [pack.ids[node] for node in path] == sequences[index]


@given(SEQUENCES, BUDGETS)
def test_a_path_is_a_chain_of_children_that_follow_their_parents(sequences: list[list[int]], budget: int) -> None:
    for pack in packs(sequences, budget):
        assert all(parent < node for node, parent in enumerate(pack.parents))
        for path in pack.paths.values():
            assert [pack.parents[node] for node in path] == [-1, *path[:-1]]
            assert [pack.depths[node] for node in path] == list(range(len(path)))


@given(SEQUENCES, BUDGETS)
def test_no_two_siblings_of_a_pack_hold_the_same_token(sequences: list[list[int]], budget: int) -> None:
    for pack in packs(sequences, budget):
        siblings = list(zip(pack.parents, pack.ids, strict=True))
        assert len(siblings) == len(set(siblings))


@given(SEQUENCES, BUDGETS)
def test_every_node_of_a_pack_is_on_a_path(sequences: list[list[int]], budget: int) -> None:
    for pack in packs(sequences, budget):
        assert {node for path in pack.paths.values() for node in path} == set(range(len(pack.ids)))
        assert len(pack.ids) == len(pack.parents) == len(pack.depths)


@given(SEQUENCES, BUDGETS)
def test_only_one_long_sequence_exceeds_the_stretched_budget(sequences: list[list[int]], budget: int) -> None:
    for pack in packs(sequences, budget):
        spelled = {tuple(sequences[index]) for index in pack.paths}
        assert len(pack.ids) <= STRETCH * budget or len(spelled) == 1


def test_sequences_that_share_little_keep_to_the_budget() -> None:
    sequences = [[number, *range(9)] for number in range(12)]
    assert [len(pack.ids) for pack in packs(sequences, 25)] == [20] * 6


def test_a_long_shared_prompt_is_not_computed_again_for_its_second_completion() -> None:
    prompt = list(range(300))
    first, second = [*prompt, *range(400, 440)], [*prompt, *range(500, 540)]
    assert [len(pack.ids) for pack in packs([first, second], 256)] == [380]


@given(SEQUENCES)
def test_without_a_limit_one_pack_holds_the_prefix_tree(sequences: list[list[int]]) -> None:
    (pack,) = packs(sequences, UNLIMITED)
    assert len(pack.ids) == len(trie(sequences))


@given(SEQUENCES, BUDGETS)
def test_a_limit_costs_at_most_what_packs_share(sequences: list[list[int]], budget: int) -> None:
    found = packs(sequences, budget)
    parts = [trie([sequences[index] for index in pack.paths]) for pack in found]
    assert [len(pack.ids) for pack in found] == [len(part) for part in parts]
    again = sum(len(a & b) for a, b in pairwise(parts))
    assert sum(map(len, parts)) == len(trie(sequences)) + again


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=6))
def test_the_common_prefix_is_what_all_begin_with_less_one_token_of_their_own(sequences: list[list[int]]) -> None:
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    shared = len(list(columns))
    assert common_prefix(sequences) == min(shared, min(map(len, sequences)) - 1)


@given(SEQUENCES, BUDGETS, BUDGETS)
def test_passes_keep_all_packs_in_order_within_the_budget(sequences: list[list[int]], budget: int, limit: int) -> None:
    parts = packs(sequences, budget)
    found = passes(parts, limit)
    assert [pack for together in found for pack in together] == parts
    for together in found:
        assert together
        assert len(together) == 1 or nodes(together) <= limit
    for together, following in pairwise(found):
        assert nodes([*together, following[0]]) > limit  # no pass is shorter than it need be


def nodes(together: list[Pack]) -> int:
    return sum(len(pack.ids) for pack in together)


def test_no_sequences_make_no_packs() -> None:
    nothing: list[Any] = []
    assert packs(nothing, 8) == []
    assert passes(nothing, 8) == []
