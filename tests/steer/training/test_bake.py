"""Baking by training: what is refused before any work, and how often the base is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bakes import NO_REPLAY, contrasting, distilled, imitating

from steer.training import bake as baking
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


def test_only_the_base_and_what_was_named_is_loaded_once(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    loads = []
    original = baking.load

    def counted(*args: Any, **kwargs: Any) -> Any:
        loads.append(args[0])
        return original(*args, **kwargs)

    baking.load = counted  # type: ignore[assignment]
    try:
        made = imitating(texts[0], folder, tmp_path / "out", as_="lora", replay=NO_REPLAY, settings={"steps": 4})
        bake(made)
    finally:
        baking.load = original
    assert len(loads) == 1, "teacher and student are one copy"
