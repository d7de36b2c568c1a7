"""`steer serve --experiment`: everything that is wrong is reported before vLLM is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico
import pytest

from steer.cli import run


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = run(["serve", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)["error"]


def write(folder: Path, name: str, **changes: Any) -> str:
    values = {"name": name, "salt": f"{name}-s", "arms": {"control": {}, "warm": {"system": "Be warm."}}}
    values = {**values, "metric": {"name": "thumbs"}, **changes}
    (folder / f"{name}.yaml").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return str(folder / f"{name}.yaml")


def test_the_problems_of_all_experiments_are_reported_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(pico.save(tmp_path / "model"))
    one = write(tmp_path, "one", arms={"control": {}, "a": {"steer": "missing"}})
    two = write(tmp_path, "two", log="postgresql://127.0.0.1:1/nothing")
    status, error = refused(capsys, model, "--experiment", one, "--experiment", two, "--experiment", "three")
    assert status == 2
    for part in ("name 'missing' is not bound", "postgresql+psycopg://127.0.0.1:1/nothing can't be opened", "'three'"):
        assert part in error


def test_an_experiment_about_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, other = (str(pico.save(tmp_path / name, kind)) for name, kind in (("a", "llama"), ("b", "qwen2")))
    status, error = refused(capsys, model, "--experiment", write(tmp_path, "tone", model=other))
    assert (status, f"is about the model {other}, not {model}" in error) == (2, True)


def test_the_key_of_a_judge_that_can_t_be_sent_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-abc\u2026")
    judge = {"name": "kind", "url": "http://h/v1", "model": "m", "instruction": "?", "key_variable": "JUDGE_KEY"}
    file = write(tmp_path, "tone", judges=[judge], secondary=[{"name": "kind"}])
    status, error = refused(capsys, str(pico.save(tmp_path / "model")), "--experiment", file)
    assert (status, "no header can carry" in error, "sk-abc" in error) == (2, True, False)


def test_a_file_without_a_salt_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(pico.save(tmp_path / "model"))
    status, error = refused(capsys, model, "--experiment", write(tmp_path, "tone", salt=None))
    assert (status, "has no salt" in error) == (2, True)


def test_a_copied_file_is_refused_together_with_what_else_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(pico.save(tmp_path / "model"))
    files = [write(tmp_path, name, salt="copied") for name in ("one", "two")]
    status, error = refused(capsys, model, *(word for file in (*files, "three") for word in ("--experiment", file)))
    assert (status, "one and two have the same salt" in error, "'three'" in error) == (2, True, True)
