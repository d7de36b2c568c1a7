"""Overlap: the same example in two sets that must not share any, however it is written."""

from __future__ import annotations

from probes.data.examples import Example, Message
from probes.data.overlap import example_digest, problems_of_overlap, shared
from probes.data.splits import held_out_split


def test_a_prompt_and_a_conversation_of_this_one_turn_are_the_same_example() -> None:
    plain = Example("Hello", "Hi", origin="a:1")
    assert example_digest(plain) == example_digest(Example(" Hello\n", (Message("user", "Hi"),), origin="b:7"))
    for other in (Example("Hello"), Example("Hello", "Ho"), Example("Hello", (Message("system", "Hi"),))):
        assert example_digest(other) != example_digest(plain)


def test_sets_that_share_examples_are_named_with_figures() -> None:
    ones = [Example(text, origin=f"a:{text}") for text in "abc"]
    others = [Example(text, origin=f"b:{text}") for text in "bcde"]
    assert [each.origin for each in shared(others, ones)] == ["b:b", "b:c"]
    assert problems_of_overlap({"a": ones}, {"b": others, "c": others[2:]}, {"d": [Example("x")]}) == [
        "2 of the 4 examples of b are also in a (the first: b:b)"
    ]


def test_no_copy_of_what_is_held_out_is_trained_on() -> None:
    digests = [f"{n % 7}" for n in range(70)]
    train, held_out = held_out_split(digests)
    assert {digests[i] for i in train} & {digests[i] for i in held_out} == set()
    assert len({digests[i] for i in held_out}) == len(held_out) > 0
    assert {digests[i] for i in [*train, *held_out]} == set(digests)
