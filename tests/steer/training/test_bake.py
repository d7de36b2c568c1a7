"""Baking by training: what is refused before any work, and how often the base is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bakes import NO_REPLAY, contrasting, distilled, imitating
from transformers import PreTrainedModel

from steer.training import work
from steer.training.api import bake
from steer.training.requests import AdapterSettings, Replay
from vectors.errors import ExampleError, OutputError, SteerError, UsageError
from vectors.steering import SteeringVector


def test_bad_input_is_refused_before_any_work(
    folder: Path, vector: SteeringVector, texts: tuple[Path, Path], asked: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    (tmp_path / "void.jsonl").write_text("\n".join(json.dumps({"prompt": f"a{i}", "completion": ""}) for i in range(3)))
    (tmp_path / "long.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "a", "completion": f"{i} " * 300}) for i in range(3))
    )

    def imitated(file: Path, **changes: Any) -> Any:
        return bake(imitating(file, folder, tmp_path / "out", **changes))

    def contrasted(against: Path) -> Any:
        made = contrasting(texts[0], against, folder, tmp_path / "out")
        return bake(made, on_event=lambda event: pytest.fail("it began to train"))

    cases: list[tuple[Any, type[SteerError], str]] = [
        (lambda: imitated(tmp_path / "empty.jsonl"), ExampleError, "is empty"),
        (lambda: imitated(tmp_path / "one.jsonl"), ExampleError, "holds one example"),
        (lambda: imitated(tmp_path / "void.jsonl"), ExampleError, "empty|no token"),
        (lambda: imitated(tmp_path / "long.jsonl"), ExampleError, "longer than the model's context of 256"),
        (lambda: contrasted(tmp_path / "empty.jsonl"), ExampleError, "is empty"),
        (lambda: imitated(texts[0], replay=Replay(texts[0], 0.25)), UsageError, "are the training data"),
        (lambda: imitated(texts[0], settings={"steps": 0, "warmup": 2.0}), UsageError, "steps is 0"),
        (lambda: imitated(texts[0], settings={"optimiser": "adamv"}), UsageError, "no optimiser 'adamv'"),
        (
            lambda: imitated(texts[0], as_="lora", adapter=AdapterSettings(full=True)),
            UsageError,
            "no adapter to write",
        ),
        (
            lambda: imitated(texts[0], adapter=AdapterSettings(lora_rank=0)),
            UsageError,
            "--lora-rank is 0, not",
        ),
        (lambda: imitated(texts[0], settings={"lr": 0.0}), UsageError, "--lr is 0, not above 0"),
        (lambda: imitated(texts[0], settings={"report_to": "foo"}), UsageError, "--report-to foo is not installed"),
        (
            lambda: imitated(texts[0], adapter=AdapterSettings(lora_targets=("nowhere",))),
            UsageError,
            "has no module nowhere",
        ),
        (lambda: distilled(folder, 1e-6 * vector, asked, tmp_path / "out"), UsageError, "nothing to learn"),
    ]
    for call, kind, reason in cases:
        with pytest.raises(kind, match=reason):
            call()
        assert not (tmp_path / "out").exists()
        assert not work.path_of(tmp_path / "out").exists(), "a better command would be refused for it"
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        imitated(texts[0])
    other = SteeringVector({0: torch.ones(16)})
    with pytest.raises(SteerError, match="hidden size 16"):
        distilled(folder, other, asked, tmp_path / "more")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders whose weights are loaded, in order, wherever that is asked for."""
    folders: list[str] = []
    original = PreTrainedModel.from_pretrained.__func__

    def counted(cls: type, path: Any, *args: Any, **options: Any) -> Any:
        folders.append(Path(path).name)
        return original(cls, path, *args, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))
    return folders


def test_the_teacher_the_student_and_the_base_are_one_copy_in_memory(
    folder: Path, vector: SteeringVector, asked: Path, tmp_path: Path, loaded: list[str]
) -> None:
    distilled(folder, vector, asked, tmp_path / "out", as_="lora", replay=NO_REPLAY, settings={"steps": 4})
    assert loaded == [folder.name]


def test_a_written_model_is_loaded_once_to_be_evaluated(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path, loaded: list[str]
) -> None:
    bake(imitating(texts[0], folder, tmp_path / "out", replay=NO_REPLAY, settings={"steps": 4}))
    base, written = loaded
    assert base == folder.name
    assert written != folder.name


def test_a_second_student_without_replay_data_is_one_copy_more(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path, loaded: list[str]
) -> None:
    bake(imitating(texts[0], folder, tmp_path / "out", as_="lora", compare_replay=True, settings={"steps": 4}))
    assert loaded == [folder.name] * 2
