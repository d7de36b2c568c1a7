"""The record of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vectors.errors import ArtifactError
from vectors.storage.runs import (
    RunRecord,
    environment,
    has_record,
    problems_of,
    read_json,
    record_of,
    record_path,
    report_of,
)

RECORD = RunRecord("bake", "fold", {"via": "auto"}, {"base": {"digest": "sha256:1"}}, outputs={"a": "sha256:2"})


def test_every_record_has_the_same_keys_and_comes_back_as_it_was() -> None:
    value = json.loads(json.dumps(RECORD.value()))
    assert list(value) == [
        "schema", "command", "mode", "config", "inputs", "environment", "metrics", "outputs", "details",
    ]  # fmt: skip
    assert RunRecord.of(value) == RECORD


def test_it_lies_in_an_output_folder_and_beside_an_output_file(tmp_path: Path) -> None:
    file = tmp_path / "v.safetensors"
    file.write_bytes(b"")
    assert RECORD.write(tmp_path) == tmp_path / "run.json"
    assert RECORD.write(file) == record_path(file) == tmp_path / "v.run.json"
    assert read_json(file) == (tmp_path / "v.run.json", RECORD.value())


def test_the_same_run_leaves_the_same_bytes(tmp_path: Path) -> None:
    first = RECORD.write(tmp_path).read_bytes()
    assert RECORD.write(tmp_path).read_bytes() == first


@pytest.mark.parametrize("name", ["report.json", "steer_merge.json"])
def test_the_records_of_earlier_versions_still_open(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"schema": 1, "recipe": {}}')
    assert read_json(tmp_path) == (tmp_path / name, {"schema": 1, "recipe": {}})


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "{"])
def test_a_damaged_record_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"run\.json is damaged"):
        read_json(tmp_path)


def test_an_output_without_a_record_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"run\.json can't be read: No such file"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schema": 7}, "schema is 7"),
        ({"config": []}, "config is an empty list, not an object"),
        ({"mode": None, "outputs": "a"}, "mode is null, not text"),
        ({"outputs": {"a": 1}}, "outputs.a is 1, not text"),
    ],
)
def test_what_is_no_record_is_said(changes: dict[str, Any], problem: str) -> None:
    assert any(problem in found for found in problems_of(RECORD.value() | changes))
    with pytest.raises(ValueError, match=problem):
        RunRecord.of(RECORD.value() | changes)
    assert problems_of([]) == ["the record is an empty list, not an object"]


def test_the_environment_names_versions_of_what_is_installed() -> None:
    found = environment("numpy", "no-such-package")
    assert set(found) == {"python", "numpy"}


def test_a_report_comes_back_from_its_record_and_from_a_file_of_an_earlier_version(tmp_path: Path) -> None:
    report = {"schema": 1, "mode": "fold", "base": {"digest": "sha256:1"}, "proof": {"kl": 0.0}, "as": "model",
              "samples": {"training": 3}, "outputs": {"a": "sha256:2"}}  # fmt: skip
    record = record_of("bake", report)
    assert record.metrics == {"proof": {"kl": 0.0}}
    assert record.details == {"samples": {"training": 3}}
    file = tmp_path / "v.safetensors"
    assert not has_record(file)
    (tmp_path / "v.report.json").write_text(json.dumps(report))
    assert has_record(file)
    assert report_of(read_json(file)[1]) == report
    record.write(file)
    assert read_json(file)[0] == tmp_path / "v.run.json"
    assert report_of(read_json(file)[1]) == report


def test_the_files_that_a_bake_read_are_files_among_the_inputs_and_older_records_of_them_still_open() -> None:
    files = {"data": "sha256:3"}
    report = {"schema": 1, "mode": "train", "base": {"digest": "sha256:1"}, "inputs": files, "outputs": {}}
    record = record_of("bake", report)
    assert record.inputs == {"base": {"digest": "sha256:1"}, "files": files}
    assert report_of(record.value()) == report
    former = record.value() | {"inputs": {"base": {"digest": "sha256:1"}, "inputs": files}}
    assert report_of(former) == report


def test_a_figure_that_is_no_number_is_null(tmp_path: Path) -> None:
    RunRecord("bake", metrics={"history": [{"loss": float("nan")}]}).write(tmp_path)
    assert read_json(tmp_path)[1]["metrics"] == {"history": [{"loss": None}]}
