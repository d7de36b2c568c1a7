"""Suites: what is read, what is refused, and that an item never changes sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steer.evaluation.suites.files import choice_of, pairs_of
from steer.evaluation.suites.items import Pair
from steer.evaluation.suites.reading import Sources, read_suite
from steer.evaluation.suites.sides import chosen
from vectors.errors import ExampleError, UsageError

SUITE = """
name: warmth
items:
  - {kind: pair, prompt: "How was it?", positive: "Lovely!", negative: Fine., group: small-talk}
  - {kind: pair, positive: "What a day!", negative: A day., id: plain}
  - {kind: choice, question: "Is it so?", options: ["yes", "no"], positive: "no", letters: false}
  - {kind: prompt, prompt: I lost my keys.}
  - {kind: neutral, prompt: "What is an algorithm?"}
"""


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_document_of_all_kinds_of_items_is_read(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(SUITE)
    suite = read_suite(Sources(suite=tmp_path / "suite.yaml"))
    first, second, third = suite.items
    assert isinstance(first, Pair)
    assert (first.positive.context, first.positive.completion, first.group) == ("How was it?", "Lovely!", "small-talk")
    assert isinstance(second, Pair)
    assert (second.positive.context, second.id) == (None, "plain")
    assert third[:4] == ("Is it so?", ("yes", "no"), 1, False)
    assert [prompt.text for prompt in suite.prompts] == ["I lost my keys."]
    assert [prompt.text for prompt in suite.neutral] == ["What is an algorithm?"]
    assert list(suite.digests) == ["suite"]


def test_all_problems_of_a_document_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(
        "nmae: x\nitems:\n  - {kind: pair, positive: a}\n  - {kind: quiz}\n"
        "  - {kind: pair, positive: a, negative: b, gruop: g}\n"
        "  - {kind: choice, question: q, options: [a, b], positive: c}\n"
        "  - {kind: pair, positive: same, negative: same}\n"
    )
    with pytest.raises(ExampleError) as caught:
        read_suite(Sources(suite=tmp_path / "suite.yaml"))
    text = "\n".join(caught.value.problems)
    for wanted in ("nmae", "did you mean name?", "items[0].negative is missing", "'quiz'", "did you mean group?",
                   "none of its options", "items[4] has the same text"):  # fmt: skip
        assert wanted in text


def test_files_of_a_document_lie_beside_it_and_their_groups_are_read(tmp_path: Path) -> None:
    lines(
        tmp_path / "pairs.jsonl",
        *({"prompt": f"p{i}", "positive": "a", "negative": "b", "group": f"g{i % 2}"} for i in range(9)),
    )
    (tmp_path / "suite.yaml").write_text("files: {pairs: pairs.jsonl}")
    suite = read_suite(Sources(suite=tmp_path / "suite.yaml"))
    assert suite.name == "suite"
    assert {item.group for item in suite.items} == {"g0", "g1"}
    assert len(suite.items) == 9


def test_an_item_never_changes_sides(tmp_path: Path) -> None:
    records = [{"prompt": f"prompt {i}", "positive": "a", "negative": "b"} for i in range(60)]
    few = pairs_of(None, None, records[:30], 0)[0]
    many = pairs_of(None, None, records[::-1], 0)[0]
    sides = {item.id: item.side for item in many}
    assert all(sides[item.id] == item.side for item in few)
    assert 10 <= [item.side for item in many].count("dev") <= 30
    assert [item.side for item in pairs_of(None, None, records, 1)[0]] != [item.side for item in many[::-1]]


def test_examples_without_partners_keep_their_sides_and_meet_one_of_their_side() -> None:
    positive, negative = [f"good {i}" for i in range(40)], [f"bad {i}" for i in range(40)]
    items = pairs_of(positive, negative, None, 0)[0]
    more = pairs_of([*positive, "another good one"], negative, None, 0)[0]

    def sides(pairs: Any) -> dict[str, str]:
        return {e.completion: pair.side for pair in pairs for e in (pair.positive, pair.negative)}

    both = sides(items).keys() & sides(more).keys()
    assert len(both) > 60
    assert all(sides(items)[text] == sides(more)[text] for text in both)


def test_some_groups_are_seen_by_the_test_alone() -> None:
    records = [{"prompt": f"{i}", "positive": "a", "negative": "b"} for i in range(200)]
    from steer.evaluation.suites.sides import with_sides

    items = [item._replace(group=f"g{i % 10}") for i, item in enumerate(pairs_of(None, None, records, 0)[0])]
    items = list(with_sides(items, 0))
    dev, test = ({item.group for item in items if item.side == side} for side in ("dev", "test"))
    assert dev < test
    assert len(test) == 10


def grouped(word: str, count: int, groups: int = 12) -> list[dict[str, str]]:
    return [{"text": f"{word} {i}", "group": f"g{i % groups}"} for i in range(count)]


def test_examples_without_partners_meet_one_of_their_group_and_whole_groups_are_held_out() -> None:
    """A negative of another group made the two groups depend on each other, so that the interval was too narrow."""
    items, _, notes = pairs_of(grouped("good", 120), grouped("bad", 110), None, 0)
    assert len(items) > 70
    for item in items:
        assert isinstance(item, Pair)
        assert item.positive.group == item.negative.group == item.group
    dev, test = ({item.group for item in items if item.side == side} for side in ("dev", "test"))
    assert dev < test
    assert len(test) == 12
    examples = 2 * len(items) + sum(int(note.split()[0]) for note in notes if "no partner in their group" in note)
    assert examples == 230
    more, _, _ = pairs_of([*grouped("good", 120), {"text": "one more", "group": "g3"}], grouped("bad", 110), None, 0)
    sides = [
        {e.completion: item.side for item in each for e in (item.positive, item.negative)}  # type: ignore[union-attr]
        for each in (items, more)
    ]
    both = sides[0].keys() & sides[1].keys()
    assert len(both) > 130
    assert all(sides[0][text] == sides[1][text] for text in both)


def test_groups_of_one_file_alone_are_those_of_its_pairs() -> None:
    ungrouped = [f"bad {i}" for i in range(60)]
    assert {item.group for item in pairs_of(grouped("good", 60, 3), ungrouped, None, 0)[0]} == {"g0", "g1", "g2"}
    assert {item.group for item in pairs_of(ungrouped, grouped("good", 60, 3), None, 0)[0]} == {"g0", "g1", "g2"}


def test_files_of_which_no_group_has_both_classes_are_refused() -> None:
    other = [{**line, "group": f"other {line['group']}"} for line in grouped("bad", 60)]
    with pytest.raises(ExampleError, match="no group has both positive and negative examples"):
        pairs_of(grouped("good", 60), other, None, 0)


def test_the_groups_of_a_pair_are_one() -> None:
    good = [{"prompt": f"p{i}", "completion": "a", "group": f"g{i % 4}"} for i in range(40)]
    bad = [{"prompt": f"p{i}", "completion": "b", "group": f"g{i % 4 // 2}"} for i in range(40)]
    assert {item.group for item in pairs_of(good, bad, None, 0)[0]} == {"g0"}
    assert {item.group for item in pairs_of(good[::2], bad[::2], None, 0)[0]} == {"g0", "g1"}
    assert {item.group for item in pairs_of([{**line, "group": ""} for line in good], bad, None, 0)[0]} == {"g0", "g1"}


def test_the_choice_of_fewer_items_follows_their_content() -> None:
    items = pairs_of(None, None, [{"prompt": f"{i}", "positive": "a", "negative": "b"} for i in range(20)], 0)[0]
    assert {item.id for item in chosen(items, 5, 0)} == {item.id for item in chosen(items[::-1], 5, 0)}


def test_persona_and_caa_lines_are_choices() -> None:
    persona = {
        "question": "Would you say it?",
        "statement": "x",
        "answer_matching_behavior": " No",
        "answer_not_matching_behavior": " Yes",
    }
    assert choice_of(persona)[:4] == ("Would you say it?", ("Yes", "No"), 1, False)
    caa = {
        "question": "Pick.\n\nChoices:\n (A) red\n (B) blue",
        "answer_matching_behavior": "(B)",
        "answer_not_matching_behavior": "(A)",
    }
    assert choice_of(caa)[:4] == ("Pick.", ("red", "blue"), 1, True)
    assert choice_of({**persona, "group": 3}).group == "3"
    with pytest.raises(ValueError, match=r"the group .* is neither text nor a whole number"):
        choice_of({**persona, "group": [3]})
    with pytest.raises(ValueError, match="none of the options"):
        choice_of({**caa, "answer_matching_behavior": "(C)"})


def test_nothing_and_prompts_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to evaluate on"):
        read_suite(Sources())
    (tmp_path / "suite.yaml").write_text("items: [{kind: prompt, prompt: Hello}]")
    with pytest.raises(ExampleError, match="no item that is scored"):
        read_suite(Sources(suite=tmp_path / "suite.yaml"))
    (tmp_path / "suite.yaml").write_text("items: []")
    with pytest.raises(ExampleError, match=r"suite\.yaml holds no item"):
        read_suite(Sources(suite=tmp_path / "suite.yaml"))
    (tmp_path / "suite.yaml").write_text("files: {pos: p.jsonl}")
    with pytest.raises(ExampleError, match=r"suite\.yaml: one class only: files\.neg is missing"):
        read_suite(Sources(suite=tmp_path / "suite.yaml"))
    with pytest.raises(ExampleError, match="one class only"):
        read_suite(Sources(pos=["a"]))


def test_items_of_one_content_count_once_whatever_their_ids_and_groups(tmp_path: Path) -> None:
    pair = {"kind": "pair", "prompt": "How was it?", "positive": "Lovely!", "negative": "Fine."}
    choice = {"kind": "choice", "question": "Is it so?", "options": ["yes", "no"], "positive": "yes"}
    items = [
        *({**pair, "id": f"c{i}"} for i in range(60)),
        {**pair, "positive": " Lovely!", "group": "talk"},
        choice, {**choice, "options": ["no", "yes"]},  # asked in both orders anyway
        {**pair, "prompt": "And now?"}, {**choice, "positive": "no"}, {**choice, "letters": False},
    ]  # fmt: skip
    (tmp_path / "suite.json").write_text(json.dumps({"items": items}))
    suite = read_suite(Sources(suite=tmp_path / "suite.json"))
    assert len(suite.items) == 5
    assert suite.items[0].id == "c0"
    (note,) = suite.notes
    assert note.startswith("61 items of the suite repeat the content of another")
    assert "'Lovely!' stands 61 times (ids c0, c1, c2, …; the first has no group)" in note


def test_a_file_of_a_suite_that_repeats_its_items_adds_none(tmp_path: Path) -> None:
    lines(
        tmp_path / "pairs.jsonl",
        {"prompt": "p", "positive": "a", "negative": "b"},
        {"prompt": "q", "positive": "a", "negative": "b"},
    )
    document = {"files": {"pairs": "pairs.jsonl"}, "items": [
        {"kind": "pair", "prompt": "p", "positive": "a", "negative": "b", "id": "mine", "group": "g"}
    ]}  # fmt: skip
    (tmp_path / "suite.json").write_text(json.dumps(document))
    suite = read_suite(Sources(suite=tmp_path / "suite.json", pairs=tmp_path / "pairs.jsonl"))
    assert [item.group for item in suite.items] == ["g", ""]
    assert "3 items of the suite repeat" in suite.notes[-1]


def test_different_items_of_one_id_are_refused(tmp_path: Path) -> None:
    pair = {"kind": "pair", "positive": "Lovely!", "id": "one"}
    items = [{**pair, "negative": "Fine."}, {**pair, "negative": "Bad."}]
    (tmp_path / "suite.json").write_text(json.dumps({"items": items}))
    with pytest.raises(ExampleError, match=r"items\[0\] and items\[1\] differ and have the id 'one'"):
        read_suite(Sources(suite=tmp_path / "suite.json"))


def test_many_wrong_items_hide_no_problem_of_another_kind(tmp_path: Path) -> None:
    items = [{"kind": "pair", "positive": "a"}] * 60 + [{"kind": "quiz"}]
    (tmp_path / "suite.json").write_text(json.dumps({"items": items, "nmae": "x", "files": {"psoitive": "p"}}))
    with pytest.raises(ExampleError) as caught:
        read_suite(Sources(suite=tmp_path / "suite.json"))
    text = "\n".join(caught.value.problems)
    for wanted in (
        '"nmae"',
        '"psoitive"',
        "items[0].negative is missing",
        "items[60].kind is 'quiz'",
        "there are more",
    ):
        assert wanted in text
    assert len(caught.value.problems) == 2 + 20 + 1


def test_an_item_without_an_id_is_named_by_its_place_and_its_group_may_be_a_number(tmp_path: Path) -> None:
    pair: dict[str, Any] = {"kind": "pair", "positive": "a", "negative": "b", "group": 3}
    choice = {"kind": "choice", "question": "q", "options": ["a", "b"], "positive": "a"}
    (tmp_path / "suite.json").write_text(json.dumps({"items": [{"kind": "prompt", "prompt": "p"}, pair, choice]}))
    first, second = read_suite(Sources(suite=tmp_path / "suite.json")).items
    assert isinstance(first, Pair)
    assert not isinstance(second, Pair)
    assert (first.negative.origin, second.origin, first.group) == ("items[1]", "items[2]", "3")
    (tmp_path / "suite.json").write_text(json.dumps({"items": [{**pair, "group": 1.5}]}))
    with pytest.raises(ExampleError, match=r"group is 1.5, not text or a whole number"):
        read_suite(Sources(suite=tmp_path / "suite.json"))
