"""Overlap: the same example in two sets that must not share any, however it is written."""

from __future__ import annotations

from probes.data.examples import Example, Message
from probes.data.overlap import (
    SKETCH,
    example_digest,
    problems_of_overlap,
    record,
    recorded_examples,
    recorded_prompts,
    shared,
)
from probes.data.splits import folds, held_out_split


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


def test_what_a_vector_records_of_its_examples_recognises_them_in_any_form_and_order() -> None:
    examples = [Example(f" answer {n}", f"question {n}") for n in range(20)]
    data = record(examples)
    assert record(examples[::-1]) == data
    copies = [Example(f"answer {n}\n", (Message("user", f"question {n} "),), origin=f"copy {n}") for n in (3, 25, 1)]
    assert [each.origin for each in recorded_examples(data, copies)] == ["copy 3", "copy 1"]
    assert recorded_prompts(data, ["question 30", " question 7 "]) == [" question 7 "]
    for other in (None, {}, {"example_digests": 5, "prompt_digests": [5, {}]}, "text"):
        assert recorded_examples(other, copies) == []
        assert recorded_prompts(other, ["question 7"]) == []


def test_of_many_examples_a_bounded_sample_is_recorded_in_which_copies_are_found() -> None:
    examples = [Example(f"text {n}") for n in range(5000)]
    data = record(examples)
    assert len(data["example_digests"]) == SKETCH
    assert data["prompt_digests"] == []
    assert len(recorded_examples(data, [*examples[::2], *(Example(f"other {n}") for n in range(3000))])) > SKETCH // 3


def test_copies_that_differ_in_white_space_are_never_on_both_sides_of_a_split() -> None:
    positive = [Example(f"{space}warm {n}") for n in range(12) for space in ("", " ")]
    fold, _ = folds(positive, [Example(f"cold {n}") for n in range(12)], 0)
    assert all(fold[2 * n] == fold[2 * n + 1] for n in range(12))


def test_no_copy_of_what_is_held_out_is_trained_on() -> None:
    digests = [f"{n % 7}" for n in range(70)]
    train, held_out = held_out_split(digests)
    assert {digests[i] for i in train} & {digests[i] for i in held_out} == set()
    assert len({digests[i] for i in held_out}) == len(held_out) > 0
    assert {digests[i] for i in [*train, *held_out]} == set(digests)
