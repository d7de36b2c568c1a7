"""The forms of example files, as rows of the table in docs/extract.md: each is written, read, and its outcome shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tables import between_marks

from probes.data.reading import read
from vectors.errors import ExampleError


class Form(NamedTuple):
    """A form: what it is called, the name of a file of it, and what stands in it."""

    what: str
    file: str
    text: str


def lines(*values: object) -> str:
    return "\n".join(map(json.dumps, values))


_TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
_PAIR = {"prompt": "Hi", "chosen": "Hello there", "rejected": "What"}
_CLASSES = [{"text": "so warm", "label": 1}, {"text": "so cold", "label": 0}]
FORMS = (
    Form("JSON lines of strings", "a.jsonl", lines("so warm", "very warm")),
    Form('JSON lines `{"text"}`', "a.jsonl", lines({"text": "so warm"}, {"text": "very warm"})),
    Form("a text file, one example a line", "a.txt", "so warm\nvery warm\n"),
    Form("a JSON array", "a.json", json.dumps(["so warm", "very warm"])),
    Form("CSV with a column `text`", "a.csv", "text\nso warm\nvery warm\n"),
    Form("TSV with `prompt` and `completion`", "a.tsv", "prompt\tcompletion\nHi\tHello\nHey\tHello you\n"),
    Form("JSON lines with a byte order mark", "a.jsonl", "\ufeff" + lines("so warm", "very warm")),
    Form('`{"prompt","completion"}`', "a.jsonl", lines({"prompt": "Hi", "completion": "Hello"})),
    Form("the same, as lists of messages (TRL)", "a.jsonl", lines({"prompt": _TURNS[:1], "completion": _TURNS[1:]})),
    Form('`{"messages"}`', "a.jsonl", lines({"messages": _TURNS})),
    Form(
        '`{"conversations"}` (ShareGPT)',
        "a.jsonl",
        lines({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
    ),
    Form(
        '`{"instruction","input","output"}` (Alpaca)',
        "a.jsonl",
        lines({"instruction": "Greet", "input": "", "output": "Hello"}),
    ),
    Form('`{"text","label"}`, labels 0 and 1', "a.jsonl", lines(*_CLASSES)),
    Form(
        "the same, labels `positive` and `negative`",
        "a.jsonl",
        lines(*({**row, "label": name} for row, name in zip(_CLASSES, ("positive", "negative"), strict=True))),
    ),
    Form(
        "the same, labels of other names",
        "a.jsonl",
        lines(*({**row, "label": name} for row, name in zip(_CLASSES, ("joy", "anger"), strict=True))),
    ),
    Form(
        '`{"prompt","completion","label"}` (TRL, KTO)',
        "a.jsonl",
        lines(
            *({"prompt": "Hi", "completion": text, "label": label} for text, label in (("Hello", True), ("No", False)))
        ),
    ),
    Form('`{"prompt","positive","negative"}`', "a.jsonl", lines({"prompt": "Hi", "positive": "Oh", "negative": "No"})),
    Form('`{"prompt","chosen","rejected"}` (TRL, DPO)', "a.jsonl", lines(_PAIR)),
    Form(
        "the same, as lists of messages",
        "a.jsonl",
        lines({"chosen": _TURNS, "rejected": [_TURNS[0], {"role": "assistant", "content": "What"}]}),
    ),
    Form(
        "CAA's questions with both answers",
        "a.json",
        json.dumps(
            [
                {
                    "question": "Q?\n (A) x\n (B) y",
                    "answer_matching_behavior": "(A)",
                    "answer_not_matching_behavior": "(B)",
                }
            ]
        ),
    ),
    Form("an object that no form has", "a.jsonl", lines({"review": "so warm", "stars": 5})),
    Form("a Parquet file", "a.parquet", "PAR1\0\1\2\3PAR1"),
    Form("a line that is cut", "a.jsonl", lines("so warm") + '\n{"text": "ve'),
    Form("an empty file", "a.jsonl", ""),
)


def outcome(form: Form, folder: Path, *, pairs: bool) -> str:
    """What reading a file of this form ends in: the number of examples, or the first problem."""
    file, other = folder / form.file, folder / f"other{Path(form.file).suffix}"
    file.write_text(form.text, encoding="utf-8")
    other.write_text(form.text.replace("warm", "chilly").replace("Hello", "Bye"), encoding="utf-8")
    try:
        contrast = read(pairs=file) if pairs else read(file, other)
    except ExampleError as error:
        return f"refused: {error.problems[0].replace(str(folder) + '/', '')}"
    if pairs:
        return f"read: {len(contrast.positive)} positive and {len(contrast.negative)} negative"
    return f"read: {len(contrast.positive)}"


def table(folder: Path, forms: Sequence[Form] = FORMS) -> str:
    """The table, in Markdown."""
    rows = ["| file | given as `--pos` (and another as `--neg`) | given as `--pairs` |", "|---|---|---|"]
    for form in forms:
        cells = [form.what, *(outcome(form, folder, pairs=pairs) for pairs in (False, True))]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def with_table(document: str, folder: Path) -> str:
    """A document with the table between its marks."""
    return between_marks(document, table(folder))
