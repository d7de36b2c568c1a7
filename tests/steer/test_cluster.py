"""Sweeps and extractions over a local Ray cluster: the numbers of one process, also where processes are killed."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import steer
from probes.models.loading import load
from steer.cluster import ModelPlace, process_task, require_cluster
from steer.evaluation.sweeping import elsewhere
from vectors.errors import ExampleError, ModelError, UsageError

with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra scale")
measured = elsewhere.measured


@pytest.fixture
def examples(tmp_path: Path) -> dict[str, str]:
    """Enough examples for several passes."""
    for name, text in (("pos", "the warm sun and yes"), ("neg", "cold no rain")):
        rows = [{"prompt": f"day {i}?", "completion": f"{text} {i}"} for i in range(150)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("pos", "neg")}


def killed_once(marker: str, loaded: Any, shared: Any, trials: Any) -> Any:
    """The cells of a task, whose process is killed the first time that any gets here."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return measured(loaded, shared, trials)
    os.kill(os.getpid(), signal.SIGKILL)


def refused(_loaded: Any, _shared: Any, task: int) -> int:
    if task == 2:
        raise ExampleError("the second can't be read", "leave it out")
    return task


@pytest.mark.slow
@with_ray
def test_a_cluster_gives_the_bits_of_one_process_though_one_of_its_processes_is_killed(
    examples: dict[str, str], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples of the extraction are shards, the layers and methods are cells, and so is the learning curve."""
    options: dict[str, Any] = {**examples, "model": model_folder, "layers": "1,2", "examples": (8,), "budget_kl": 0.4}
    vector = steer.extract(**examples, model=model_folder, budget_kl=0).vector
    alone = steer.sweep(vector, methods="diffmean", **options)
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    marker = tmp_path / "killed"
    monkeypatch.setattr(elsewhere, "measured", functools.partial(killed_once, str(marker)))
    spread = steer.sweep(
        vector, methods=("diffmean",), report=tmp_path / "sweep", ray="local", **options
    )  # fmt: skip
    assert marker.exists()
    assert spread.vector.digest == alone.vector.digest
    assert spread.report == alone.report
    assert spread.swept.cells["reused"] == 0
    assert len(list((tmp_path / "sweep" / "cells").iterdir())) == spread.swept.cells["measured"]


def test_what_a_task_refuses_is_raised_here_as_it_was_there(model_folder: Path) -> None:
    loaded = load(model_folder, "cpu", "float32")
    place = ModelPlace(str(model_folder), loaded.identity["digest"], "cpu", "float32", 1)
    assert process_task(place, refused, None, 1) == 1
    error = process_task(place, refused, None, 2)
    assert isinstance(pickle.loads(pickle.dumps(error)), ExampleError)
    assert isinstance(process_task(place._replace(digest="sha256:0"), refused, None, 1), ModelError)


@with_ray
def test_an_address_that_is_none_is_refused_before_a_model_is_loaded(
    examples: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="--ray is empty"):
        steer.extract(**examples, model="nowhere", ray=" ")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--ray needs Ray"):
        require_cluster("local")
