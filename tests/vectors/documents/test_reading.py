"""JSON and YAML of anyone are read or refused with a reason, in bounded time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vectors.documents import json_text, yaml_text
from vectors.documents.yaml_text import parse
from vectors.errors import ModelError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 10**5 + b"}", "too large"),
        (b"[" * 10**5, "nested"),
        (b"[" * 500 + b"]" * 500, "nested more than 100"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"\\uDFFF": 1}', "half a character"),
        (b"[" + b"[]," * 600_000 + b"[]]", "more than 1,000,000 values"),
        (b"{", "not JSON"),
        (b"", "not JSON"),
    ],
)
def test_what_is_no_json_is_refused_with_its_reason(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        json_text.parse(content, unique=True)


def test_a_byte_order_mark_is_skipped_and_constants_are_taken_where_configurations_have_them() -> None:
    assert json_text.parse(b'\xef\xbb\xbf{"a": [1, 0.5]}') == {"a": [1, 0.5]}
    assert json_text.parse('{"limit": [0.0, Infinity]}', constants=True) == {"limit": [0.0, float("inf")]}


def test_only_ordinary_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"[1]" + b" " * 100)
    for name, reason in (("pipe", "not an ordinary file"), ("large", "at most 50"), ("none", "No such file")):
        with pytest.raises(ModelError, match=reason) as caught:
            json_text.read(tmp_path / name, ModelError, "fetch it again", largest=50)
        assert str(tmp_path / name) in str(caught.value)
        assert caught.value.hint == "fetch it again"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "stands for more than"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 10**5, "nested"),
        ("{" * 10**5, "nested"),
        ("- " * 10**4 + "a", "nested"),
        ("a: " + "[" * 60 + "]" * 60, "nested"),
        ("a: 1\na: 2", "the key 'a' twice"),
        ("[" + "a, " * 200_000 + "]", "too long"),
        ("x" * 2_000_000, "at most 1,000,000"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("!!binary aGVsbG8=", "could not determine a constructor"),
        ("? [a]\n: 1", "unhashable|acceptable"),
        ("a: [", "expected|end"),
    ],
)
def test_yaml_that_would_take_for_ever_or_means_nothing_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(text)


def test_anchors_merge_keys_and_dates_are_plain_yaml() -> None:
    value = parse("shared: &s {weight: 5e-4, day: 2024-01-01}\na: {<<: *s, weight: 2}\nb: *s\n")
    assert value["a"] == {"weight": 2, "day": "2024-01-01"}
    assert value["b"] == {"weight": 5e-4, "day": "2024-01-01"}
    nested = parse("c: &c {k: 0}\nx: {y: &a {<<: *c, k: 1}}\nb: {<<: *a}\n")
    assert nested["b"] == nested["x"]["y"] == {"k": 1}


def test_a_long_document_of_json_is_read_as_json() -> None:
    text = '{"shards": [' + ", ".join(f'"model.layers.{i}.weight"' for i in range(100_000)) + "]}"
    assert len(parse(text)["shards"]) == 100_000
    assert parse("{a: 1, b: [x]}") == {"a": 1, "b": ["x"]}
    assert yaml_text.parse("") is None


def test_keys_and_the_values_that_are_names_stay_text() -> None:
    text = "1e3: 1e3\nno: no\nname: 010\nother: 010\n"
    assert parse(text, texts=("name",)) == {"1e3": 1000.0, "no": False, "name": "010", "other": 10}
    assert parse("[1e3, {1: &a 2, name: *a}]", texts=("name",)) == [1000.0, {"1": 2, "name": "2"}]
