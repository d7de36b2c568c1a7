"""Layouts of files: arrays, tables and plain texts are read, and other files are named for what they look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from probes.data.examples import Message
from probes.data.reading import read, read_class, read_prompts
from vectors.errors import ExampleError

USER, HELLO, WHAT = (
    {"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello"), ("assistant", "What?"))
)


def file(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path) -> tuple[tuple[str, ...], str]:
    with pytest.raises(ExampleError) as caught:
        read(pairs=path)
    return caught.value.problems, caught.value.hint


def test_a_json_array_is_read_and_its_bad_items_are_named(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"},
        {"prompt": "Bye", "chosen": "Ciao", "rejected": "."},
    ]
    array = file(tmp_path / "a.json", json.dumps(rows, indent=2))
    lines = file(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    found, expected = read(pairs=array), read(pairs=lines)
    assert [e.content for e in found.positive] == [e.content for e in expected.positive]
    assert found.paired
    assert found.positive[1].origin == f"{array}:item 2"
    (problem,), _ = refused(file(tmp_path / "b.json", json.dumps([*rows, {"prompt": "x"}])))
    assert problem.startswith(f"{tmp_path / 'b.json'}:item 3: no known form has the keys prompt")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_label_beside_a_completion_is_its_class(tmp_path: Path, suffix: str) -> None:
    rows = [("Hi", "Hello", True), ("Hi", "What?", False), ("Bye", "Ciao", True)]
    lines = [json.dumps({"prompt": p, "completion": c, "label": label}) for p, c, label in rows]
    table = ["prompt,completion,label", *(",".join(map(str, row)) for row in rows)]
    path = file(tmp_path / f"kto{suffix}", "\n".join(table if suffix == ".csv" else lines))
    found = read(pairs=path)
    assert [e.completion for e in found.positive] == ["Hello", "Ciao"]
    assert [e.completion for e in found.negative] == ["What?"]
    assert not found.paired
    # Given as one class, half of it would count as its opposite.
    with pytest.raises(ExampleError, match="holds both classes"):
        read_class(path, "--data")


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".TSV", "\t")])
def test_a_table_with_a_header_is_read(tmp_path: Path, suffix: str, separator: str) -> None:
    rows = [
        ["prompt", "chosen", "rejected"],
        ["Hi", '"Hello, you"'.replace("'", ""), "What?"],
        ["", "", ""],
        ["Bye", "Ciao", "."],
    ]
    text = "\r\n".join(separator.join(row) for row in rows)
    found = read(pairs=file(tmp_path / f"a{suffix}", "\ufeff" + text))
    assert [e.completion for e in found.positive] == ["Hello, you", "Ciao"]
    (problem,), _ = refused(file(tmp_path / f"b{suffix}", text + f"\r\nx{separator}y"))
    assert problem == f"{tmp_path / f'b{suffix}'}:5: the row has 2 cells, and the header 3"


def test_cells_may_hold_messages(tmp_path: Path) -> None:
    cells = [json.dumps(value).replace('"', '""') for value in ([USER, HELLO], [USER, WHAT])]
    found = read(pairs=file(tmp_path / "a.csv", "chosen,rejected\n" + ",".join(f'"{cell}"' for cell in cells)))
    assert found.positive[0].content == ((Message("user", "Hi"),), "assistant", "Hello")


def test_each_line_of_a_txt_file_is_a_text_or_a_prompt(tmp_path: Path) -> None:
    one, other = file(tmp_path / "a.txt", "The sea.\n\nThe sun.\n"), file(tmp_path / "b.txt", "Rain.\n")
    assert [e.completion for e in read(one, other).positive] == ["The sea.", "The sun."]
    assert read_prompts(one)[0] == ["The sea.", "The sun."]
    assert read_prompts(file(tmp_path / "c.csv", "prompt,id\nHi,1\n"))[0] == ["Hi"]


@pytest.mark.parametrize(
    ("content", "problem", "hint"),
    [
        (b"PAR1\x00", "looks like a Parquet file", "pandas.read_parquet"),
        (b"\x1f\x8b\x08", "looks like a gzip file", "gunzip a.jsonl"),
        (b"PK\x03\x04", "looks like a zip file, or a spreadsheet", "save the spreadsheet as CSV"),
        ("hi".encode("utf-16"), "looks like UTF-16 text", "iconv"),
        (b"prompt,chosen,rejected\na,b,c", "invalid JSON", "if it is a table with the header 'prompt,chosen,rejected'"),
        (b"The sea.\nThe sun.", "invalid JSON", "if each line is a plain text, name it .txt"),
        (b'{\n "data": [\n  {"text": "a"}\n ]\n}', "invalid JSON", "whose values may lie under 'data'"),
        (b'[\n{"text": "a"},\n', "invalid JSON", "a JSON array that is cut"),
    ],
)
def test_other_files_are_named_for_what_they_look_like(tmp_path: Path, content: bytes, problem: str, hint: str) -> None:
    found = refused(file(tmp_path / "a.jsonl", content))
    assert problem in found[0][0]
    assert hint in found[1]


@pytest.mark.parametrize(
    ("row", "context"),
    [
        ({"prompt": "Hi", "chosen": [HELLO], "rejected": [WHAT]}, (Message("user", "Hi"),)),
        ({"prompt": [USER], "chosen": [HELLO], "rejected": [WHAT]}, (Message("user", "Hi"),)),
        ({"prompt": "Hi", "chosen": [USER, HELLO], "rejected": [USER, WHAT]}, (Message("user", "Hi"),)),
        ({"chosen": [USER, HELLO], "rejected": [USER, WHAT]}, (Message("user", "Hi"),)),
        ({"chosen": "Human: Hi Assistant: Hello", "rejected": "Human: Hi Assistant: What?"}, "Human: Hi Assistant:"),
    ],
)
def test_preferences_are_read_in_every_form_of_trl(row: dict[str, Any], context: object) -> None:
    found = read(pairs=[row])
    assert found.paired
    assert [(e.context, e.completion.strip()) for e in (*found.positive, *found.negative)] == [
        (context, "Hello"),
        (context, "What?"),
    ]


def test_answers_to_different_conversations_are_no_pair() -> None:
    row = {"chosen": [USER, HELLO], "rejected": [{"role": "user", "content": "Ho"}, WHAT]}
    with pytest.raises(ExampleError, match="chosen and rejected answer different conversations"):
        read(pairs=[row])


def test_a_persona_line_with_both_answers_is_a_statement_and_no_question_with_choices() -> None:
    line = {"question": "Is this you?", "statement": "I like parties", "answer_matching_behavior": " Yes",
            "answer_not_matching_behavior": " No"}  # fmt: skip
    found = read(pairs=[line, line | {"statement": "I stay in", "answer_matching_behavior": " No"}])
    assert [e.completion for e in found.positive] == ["I like parties"]
