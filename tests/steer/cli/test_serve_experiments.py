"""`steer serve --experiment`: everything that is wrong is reported before vLLM is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico
import pytest

from steer.cli import run
from steer.cli.commands import serve
from steer.experiments.specification import Arm, Experiment, Metric
from vectors.errors import UsageError


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = run(["serve", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)["error"]


def write(folder: Path, name: str, **changes: Any) -> str:
    values = {"name": name, "salt": "s", "arms": {"control": {}, "warm": {"system": "Be warm."}}}
    (folder / f"{name}.yaml").write_text(json.dumps({**values, "metric": {"name": "thumbs"}, **changes}))
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


def test_adapters_of_arms_become_flags_of_vllm(tmp_path: Path) -> None:
    for name, rank in (("a", 4), ("b", 24)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
    arms = (Arm("control", 0.4), Arm("a", 0.3, lora=str(tmp_path / "a")), Arm("b", 0.3, lora=str(tmp_path / "b")))
    experiment = Experiment("tone", arms, Metric("thumbs"), "salt")
    flags = serve._adapters([experiment], ())
    assert flags[:4] == ["--enable-lora", "--max-lora-rank", "32", "--lora-modules"]
    assert [json.loads(text) for text in flags[4:]] == [
        {"name": "tone.a", "path": str(tmp_path / "a")},
        {"name": "tone.b", "path": str(tmp_path / "b")},
    ]
    assert serve._adapters([], ("--lora-modules", "x=y")) == []
    with pytest.raises(UsageError, match="beside -- --lora-modules"):
        serve._adapters([experiment], ("--lora-modules", "x=y"))
