"""Reading examples: every form of a line, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from probes.data import formats
from probes.data.examples import Example, Message
from probes.data.reading import SHOWN, Contrast, read, read_class
from vectors.errors import ExampleError

PAIR = {"prompt": "How are you?", "positive": "Great!", "negative": "Awful."}
PERSONA = {"question": "Is this you?", "statement": "I like parties", "answer_matching_behavior": " Yes"}
TEMPLATE = {
    "template": "You are {persona}.",
    "positive": ["happy", "glad"],
    "negative": ["sad", "low"],
    "suffixes": ["I", "We"],
}

# Of each form: a line, and the examples that it stands for.
FORMS: dict[str, tuple[dict[str, Any], list[tuple[object, str, str, bool | None]]]] = {
    "text": ({"text": "a text"}, [(None, "assistant", "a text", None)]),
    "completion": ({"prompt": "Hi", "completion": "Hello"}, [("Hi", "assistant", "Hello", None)]),
    "messages": (
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]},
        [((Message("system", "Be kind."),), "user", "Hi", None)],
    ),
    "labelled": ({"text": "a text", "label": 1}, [(None, "assistant", "a text", True)]),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
            ]
        },
        [((Message("system", "Be kind."), Message("user", "Hi")), "assistant", "Hello", None)],
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "Three"},
        [("Add.\n\n1 and 2", "assistant", "Three", None)],
    ),
    "pairs": (PAIR, [("How are you?", "assistant", "Great!", True), ("How are you?", "assistant", "Awful.", False)]),
    "persona": (PERSONA, [(None, "assistant", "I like parties", True)]),
    "preference": (
        {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"},
        [("Hi", "assistant", "Hello", True), ("Hi", "assistant", "What?", False)],
    ),
    "caa": (
        {
            "question": "Tea?\n (A) Yes\n (B) No",
            "answer_matching_behavior": "(A)",
            "answer_not_matching_behavior": "(B)",
        },
        [("Tea?\n (A) Yes\n (B) No", "assistant", "(A)", True), ("Tea?\n (A) Yes\n (B) No", "assistant", "(B)", False)],
    ),
    "template": (
        TEMPLATE,
        [
            ("You are happy.", "assistant", "I", True),
            ("You are sad.", "assistant", "I", False),
            ("You are happy.", "assistant", "We", True),
            ("You are sad.", "assistant", "We", False),
            ("You are glad.", "assistant", "I", True),
            ("You are low.", "assistant", "I", False),
            ("You are glad.", "assistant", "We", True),
            ("You are low.", "assistant", "We", False),
        ],
    ),
}


def write(path: Path, *lines: object) -> Path:
    """A file of JSON lines; a string stands for itself."""
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def problems(*arguments: Any, **options: Any) -> tuple[str, ...]:
    """What reading complains about; every complaint comes with a next step."""
    with pytest.raises(ExampleError) as caught:
        read(*arguments, **options)
    assert caught.value.hint
    return caught.value.problems


def completions(contrast: Contrast) -> tuple[list[str], list[str]]:
    return [e.completion for e in contrast.positive], [e.completion for e in contrast.negative]


# Forms of a line


@pytest.mark.parametrize("form", formats.available())
def test_every_form_gives_the_examples_it_stands_for(form: str) -> None:
    line, expected = FORMS[form]
    found = formats.available()[form].parse(line, "file:1")
    assert [(e.context, e.role, e.completion, e.label) for e in found] == expected
    assert {e.origin for e in found} == {"file:1"}
    assert line.keys() >= formats.available()[form].KEYS


@pytest.mark.parametrize("form", formats.available())
def test_a_form_is_recognised_by_its_keys_also_with_others_beside_them(form: str) -> None:
    line, expected = FORMS[form]
    line = line | {"id": 7}
    other = line | {"statement": "I stay in", "answer_matching_behavior": "No"}
    opposite = json.loads(json.dumps(line).replace(json.dumps(expected[0][2])[1:-1], "something else"))
    sources = {"pos": [line], "neg": [opposite]}
    if expected[0][3] is not None:
        sources = {"pairs": [line, other] if form == "persona" else [line]}
    if form == "labelled":
        sources = {"pairs": [line, opposite | {"label": 0}]}
    contrast = read(**sources)
    assert [e.completion for e in contrast.positive] == [said for _, _, said, label in expected if label is not False]


USER, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CONVERSATION = ((Message("user", "Hi"),), "assistant", "Hello")


@pytest.mark.parametrize(
    ("line", "content"),
    [
        ({"prompt": [USER], "completion": [HELLO]}, CONVERSATION),
        ({"prompt": [USER], "completion": "Hello"}, CONVERSATION),
        ({"prompt": "Hi", "completion": [HELLO]}, CONVERSATION),
        ({"conversations": [USER, HELLO]}, CONVERSATION),
        (
            {
                "system": "Be kind.",
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            },
            ((Message("system", "Be kind."), Message("user", "Hi")), "assistant", "Hello"),
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello", "text": "### Hi"}, ("Hi", "assistant", "Hello")),
        (
            {"instruction": "Hi", "input": None, "output": "Hello", "system": "Be kind."},
            ((Message("system", "Be kind."), Message("user", "Hi")), "assistant", "Hello"),
        ),
    ],
)
def test_conversations_are_read_in_the_forms_of_other_tools(line: dict[str, Any], content: tuple[object, ...]) -> None:
    assert [e.content for e in read_class([line], "--data")[0]] == [content]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"conversations": [{"from": "tool", "value": "x"}]}, "a turn is from 'tool', not human, gpt or system"),
        ({"conversations": "Hi"}, "conversations must be a list of at least one {from, value}"),
        ({"instruction": "Hi", "output": "x", "history": [["a", "b"]]}, "history holds earlier turns"),
        ({"instruction": "Hi", "input": 5, "output": "x"}, "input must be a text"),
        ({"prompt": [USER], "completion": []}, "completion must be a text, or a list of at least one"),
        ({"prompt": [{"role": "user"}], "completion": "x"}, "content is missing"),
    ],
)
def test_a_conversation_that_is_not_understood_is_named(line: dict[str, Any], complaint: str) -> None:
    assert complaint in problems([line], ["other"])[0]


@pytest.mark.parametrize("labels", [(1, 0), (True, False), ("1", "0"), (" Positive", "negative"), (1.0, 0.0)])
def test_two_plain_classes_are_read_by_their_label_and_that_is_reported(labels: tuple[object, object]) -> None:
    rows = [{"text": "warm", "label": labels[0]}, {"text": "cold", "label": labels[1]}]
    contrast = read(pairs=[*rows, {"text": "glad", "label": labels[0]}])
    assert completions(contrast) == (["warm", "glad"], ["cold"])
    assert not contrast.paired
    first, second = (str(label).strip() for label in labels)
    assert contrast.notes == (f"in --pairs, the label {first} (2) is the positive class and {second} (1) the negative",)


def test_labels_that_are_no_plain_classes_are_refused_by_name() -> None:
    rows = [{"text": text, "label": label} for text, label in (("a", "joy"), ("b", "fear"), ("c", "joy"))]
    (problem,) = problems(pairs=rows)
    assert problem == "--pairs:1: the label 'joy' says neither positive nor negative; --pairs has 'joy' (2), 'fear' (1)"
    assert "the label '2' says neither" in problems(pairs=[{"text": t, "label": n} for n, t in enumerate("abc")])[0]
    assert "--pos holds 2 classes, but was given as --pos: 'joy' (2), 'fear' (1)" in problems(rows, ["x"])
    assert completions(read([rows[0], rows[2]], [rows[1]])) == (["a", "c"], ["b"])
    ones, zeros = ([{"text": text, "label": label}] for text, label in (("a", 1), ("b", 0)))
    assert "say that its examples are negative" in problems(zeros, ones)[0]
    assert completions(read(ones, zeros)) == (["a"], ["b"])


def test_a_plain_string_is_a_text() -> None:
    assert completions(read(['"quoted"', {"text": "object"}], ["other"])) == (['"quoted"', "object"], ["other"])


def test_the_two_sides_of_a_pair_share_the_prompt_and_the_name_of_the_pair() -> None:
    contrast = read(pairs=[PAIR, PAIR | {"prompt": "And now?"}])
    assert contrast.paired
    assert [e.pair for e in contrast.positive] == [e.pair for e in contrast.negative]
    assert len({e.pair for e in contrast.positive}) == 2


def test_a_template_pairs_each_word_with_its_counterpart_at_each_suffix() -> None:
    contrast = read(pairs=[TEMPLATE])
    assert contrast.paired
    sides = [(p.context, n.context, p.completion == n.completion) for p, n in zip(*contrast[:2], strict=True)]
    assert sides == [("You are happy.", "You are sad.", True)] * 2 + [("You are glad.", "You are low.", True)] * 2


def test_a_persona_file_holds_both_classes_and_is_no_list_of_pairs() -> None:
    lines = [PERSONA, PERSONA | {"statement": "I stay in", "answer_matching_behavior": " No"}]
    contrast = read(pairs=lines)
    assert completions(contrast) == (["I like parties"], ["I stay in"])
    assert not contrast.paired


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"text": ""}, "text is empty"),
        ({"text": "  \n"}, "text is empty"),
        ({"text": 3}, "text must be a text"),
        ({"text": None}, "text must be a text"),
        ({"prompt": "a", "completion": ["b"]}, "completion must be a text"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": [{"role": "user"}]}, "content is missing"),
        (PERSONA | {"answer_matching_behavior": "Maybe"}, "must be Yes or No, not 'maybe'"),
        (TEMPLATE | {"template": "no slot"}, "must contain {persona}"),
        (TEMPLATE | {"negative": ["sad"]}, "positive has 2 words and negative 1"),
        (TEMPLATE | {"suffixes": []}, "suffixes must be a list of texts"),
        ({"utterance": "x"}, "no known form has the keys utterance"),
        ({}, r"no known form has the keys \(none\)"),
        ({"chosen": "a", "rejected": ["b"]}, "must both be texts, or both messages"),
        ({"chosen": "a ", "rejected": "a b"}, "differ in nothing but their length"),
        ({"chosen": "a b", "rejected": "a b"}, "chosen and rejected are the same"),
        ({"chosen": [], "rejected": []}, "chosen must be a text, or a list of at least one {role, content}"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "so chosen and rejected must hold messages too"),
        (
            {"question": "?", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": " (A)"},
            "both answers are",
        ),
        (7, "a line must be a text or an object, not 7"),
        (None, "a line must be a text or an object, not null"),
    ],
)
def test_a_line_that_is_wrong_says_what_is_wrong_and_where(tmp_path: Path, line: Any, complaint: str) -> None:
    found = problems(write(tmp_path / "a.jsonl", "", json.dumps(line)), ["fine"])
    assert found[0].startswith(f"{tmp_path / 'a.jsonl'}:2: ")
    assert complaint.replace("\\", "") in found[0]


# Files


def test_a_file_and_a_list_of_the_same_lines_give_the_same_examples(tmp_path: Path) -> None:
    lines = ["one", "two"]
    from_file = read(write(tmp_path / "p.jsonl", *map(json.dumps, lines)), str(write(tmp_path / "n.jsonl", '"three"')))
    from_list = read(lines, ["three"])
    assert completions(from_file) == completions(from_list) == (["one", "two"], ["three"])
    assert from_file.digests == from_list.digests
    assert from_list.positive[1].origin == "--pos:2"


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_no_content(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf"one"\r\n\r\n   \r\n{"text":"two"}\r\n\n')
    contrast = read(path, ["three"])
    assert completions(contrast)[0] == ["one", "two"]
    assert [e.origin for e in contrast.positive] == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_line(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'"one{separator}more"\n"two"\n', encoding="utf-8")
    assert completions(read(path, ["other"]))[0] == [f"one{separator}more", "two"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path / "none.jsonl", ["x"]) == (f"there is no file {tmp_path / 'none.jsonl'}",)


def test_what_is_wrong_with_both_files_is_told_at_once(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", "{", '"fine"', "nonsense")
    found = problems(bad, tmp_path / "none.jsonl")
    assert [p.partition(": ")[0] for p in found[:2]] == [f"{bad}:1", f"{bad}:3"]
    assert found[2] == f"there is no file {tmp_path / 'none.jsonl'}"


@pytest.mark.parametrize("content", ["", "\n \r\n\n", "\ufeff"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content, encoding="utf-8")
    assert problems(path, ["x"]) == (f"{path} is empty",)
    assert problems([], ["x"]) == ("--pos is empty",)


def test_a_folder_is_not_a_file_of_examples(tmp_path: Path) -> None:
    assert "can't be read: Is a directory" in problems(tmp_path, ["x"])[0]


def test_text_that_is_not_utf8_is_an_error_at_a_byte(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes('"naïve"'.encode("latin-1"))
    assert problems(path, ["x"]) == (f"{path} is not UTF-8 text (byte 3)",)


def test_invalid_json_is_reported_with_line_and_column(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '"one"', "", '{"text": oops}')
    assert problems(path, ["x"]) == (f"{path}:3: invalid JSON at column 10: Expecting value",)


def test_many_bad_lines_are_counted_and_the_first_are_shown() -> None:
    found = problems([{"text": ""}] * (SHOWN + 7), ["x"])
    assert len(found) == SHOWN + 1
    assert found[0].startswith("--pos:1: ")
    assert found[-1] == "… and 7 more"


@pytest.mark.parametrize("depth", [500, 2_000, 100_000])
@pytest.mark.parametrize("frame", ["%s", '{"messages": %s}'])
def test_deep_nesting_is_an_error_and_no_crash(tmp_path: Path, depth: int, frame: str) -> None:
    path = write(tmp_path / "p.jsonl", frame % ("[" * depth + "]" * depth))
    assert problems(path, ["x"])[0].startswith(f"{path}:")


def test_a_number_beyond_what_python_reads_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", "1" * 5_000)
    assert problems(path, ["x"])[0].startswith(f"{path}:1: ")


@pytest.mark.parametrize("line", ['"\\ud83d"', '{"text": "half \\udc00"}', '{"prompt": "a", "completion": "\\ud800"}'])
def test_half_a_character_is_an_error_where_it_stands(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "p.jsonl", '"\\ud83d\\ude00 whole"', line)
    found = problems(path, ["x"])
    assert found[0].startswith(f"{path}:2: ")
    assert "half a character" in found[0]


def test_half_a_character_in_a_template_is_found_too() -> None:
    assert "suffixes holds half a character" in problems(pairs=[TEMPLATE | {"suffixes": ["I", "\ud800"]}])[0]


def test_a_list_that_holds_no_json_is_an_error() -> None:
    assert "not JSON serializable" in problems([{"text": object()}], ["x"])[0]  # type: ignore[list-item]


def test_mixed_forms_are_reported_with_the_first_line_of_each() -> None:
    found = problems(["one", {"prompt": "a", "completion": "b"}, {"text": "c"}], ["x"])
    assert found == ("--pos mixes formats: text (line 1), completion (line 2)",)


@pytest.mark.parametrize(
    "other", [{"prompt": "a", "completion": "x"}, {"messages": [{"role": "user", "content": "x"}]}]
)
def test_two_files_of_different_forms_are_mixed_formats(other: dict[str, Any], tmp_path: Path) -> None:
    """What tells the classes apart would be their form, such as a chat template that only one of them has."""
    path = write(tmp_path / "n.jsonl", other)
    kind = "completion" if "prompt" in other else "messages"
    (found,) = problems(["one"], path)
    assert found.startswith(f"--pos and {path} mix formats: text and {kind}")
    assert read(["one"], [{"text": "two"}]).positive  # a plain string is a text


# Classes


def test_one_class_alone_is_an_error() -> None:
    assert "--neg is missing" in problems(["x"])[0]
    assert "--pos is missing" in problems(neg=["x"])[0]
    assert "no negative example" in problems(pairs=[PERSONA])[0]
    assert "no positive example" in problems(pairs=[PERSONA | {"answer_matching_behavior": "no"}])[0]


def test_pairs_stand_alone() -> None:
    assert "--pairs holds both classes" in problems(["x"], None, [PAIR])[0]
    assert "--pairs holds both classes" in problems(None, ["x"], [PAIR])[0]


def test_lines_without_a_class_can_not_be_pairs() -> None:
    assert problems(pairs=["a", "b"]) == ("--pairs:1: the line does not say which class it belongs to (2 such lines)",)


@pytest.mark.parametrize("flag", ["--pos", "--neg"])
@pytest.mark.parametrize("lines", [[PAIR], [PERSONA, PERSONA | {"answer_matching_behavior": "No"}]])
def test_a_file_of_both_classes_given_as_one_is_an_error(tmp_path: Path, flag: str, lines: list[object]) -> None:
    path = write(tmp_path / "both.jsonl", *lines)
    sources: list[Any] = [path, ["x"]] if flag == "--pos" else [["x"], path]
    assert problems(*sources) == (f"{path} holds both classes (1 positive, 1 negative), but was given as {flag}",)


def test_a_persona_file_of_one_answer_may_be_one_class() -> None:
    other = PERSONA | {"statement": "I stay at home", "answer_matching_behavior": "No"}
    assert completions(read([PERSONA], [other])) == (["I like parties"], ["I stay at home"])


def test_the_same_file_twice_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '"one"', '"two"')
    assert "hold the same examples" in problems(path, path)[0]


def test_the_same_examples_in_another_order_or_number_are_an_error() -> None:
    assert "hold the same examples" in problems(["one", "two"], ["two", "one"])[0]
    assert "hold the same examples" in problems(["one", "two", "one"], [{"text": "two"}, "one"])[0]
    assert "the same examples as positive and as negative" in problems(pairs=[PAIR | {"negative": "Great!"}])[0]


def test_the_same_completion_after_other_prompts_is_another_example() -> None:
    contrast = read([{"prompt": "Be kind", "completion": "I"}], [{"prompt": "Be cruel", "completion": "I"}])
    assert contrast.warnings == ()


def test_examples_in_both_classes_are_warned_of() -> None:
    (warning,) = read(["one", "two", "three"], ["three", "two", "four"]).warnings
    assert warning == "2 of the examples stand in both classes (the first at --pos:2)"


def test_unequal_counts_are_fine_and_unpaired() -> None:
    contrast = read(["one", "two", "three"], ["four"])
    assert (len(contrast.positive), len(contrast.negative), contrast.paired) == (3, 1, False)


def test_two_files_with_the_same_prompts_in_the_same_order_are_pairs() -> None:
    def lines(word: str, *prompts: str) -> list[str | dict[str, Any]]:
        return [{"prompt": prompt, "completion": f"{word} {prompt}"} for prompt in prompts]

    assert read(lines("yes", "a", "b"), lines("no", "a", "b")).paired
    assert not read(lines("yes", "a", "b"), lines("no", "b", "a")).paired
    assert not read(lines("yes", "a", "b"), lines("no", "a")).paired
    assert not read(["yes a", "yes b"], ["no a", "no b"]).paired


def test_conversations_of_one_message_are_no_pairs() -> None:
    def line(content: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": content}]}

    assert not read([line("a"), line("b")], [line("c"), line("d")]).paired


def test_the_digest_is_that_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    first = read(write(tmp_path / "a.jsonl", '"one"'), ["x"]).digests
    second = read(write(tmp_path / "b.jsonl", '"one"'), ["x"]).digests
    third = read(write(tmp_path / "b.jsonl", '"two"'), ["x"]).digests
    assert first == second != third
    assert Example("a", "p", origin="here").content == Example("a", "p", label=True, origin="there").content


_TURN = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.mark.parametrize(
    "line",
    [
        {"conversations": _TURN},
        {"instruction": "Greet", "input": " ", "output": "Hello", "history": "[]"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    ],
)
def test_a_label_beside_a_conversation_is_its_class_as_beside_a_text(line: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "both.jsonl"
    other = json.loads(json.dumps(line).replace("Hello", "Bye"))
    file.write_text("\n".join(json.dumps({**row, "label": label}) for row, label in ((line, True), (other, False))))
    contrast = read(pairs=file)
    assert [example.completion for example in (*contrast.positive, *contrast.negative)] == ["Hello", "Bye"]
    with pytest.raises(ExampleError, match="holds both classes"):
        read(file, file)


@pytest.mark.parametrize("key", ["instruction", "conversations", "question"])
def test_a_preference_whose_prompt_stands_elsewhere_is_refused_not_read_without_it(key: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({key: "Write a poem", "chosen": "Roses are", "rejected": "No way"}))
    with pytest.raises(ExampleError, match=f"beside {key}, not beside prompt"):
        read(pairs=file)


def test_a_group_is_read_beside_any_form_and_must_be_text_or_a_number() -> None:
    lines = [{"text": "a", "group": "x"}, {"prompt": "p", "completion": "b"}, {"text": "c", "group": 3}]
    contrast = read([lines[0], lines[2]], [{"text": "d"}, {"text": "e", "group": "x"}])
    assert [each.group for each in contrast.positive] == ["x", "3"]
    assert [each.group for each in contrast.negative] == ["", "x"]
    pairs = read(pairs=[{"prompt": "p", "positive": "a", "negative": "b", "group": "t"}] * 2)
    assert {each.group for each in (*pairs.positive, *pairs.negative)} == {"t"}
    with pytest.raises(ExampleError, match=r"the group .* is neither text nor a whole number"):
        read([{"text": "a", "group": ["x"]}], ["b"])
