"""Bakes that are interrupted: the same command resumes them to the same weights; another run is refused."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bakes import NO_REPLAY, distilled, files, imitating
from forked import Forking

from steer.training import bake as baking
from steer.training import loop, work
from steer.training.api import bake
from steer.training.modes import imitate
from steer.training.requests import Replay
from vectors.errors import UsageError
from vectors.steering import SteeringVector

RUN = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from steer.training import loop
from steer.training.data import filtering
filtering.PERPLEXITY, filtering.REPETITION = 1e9, 1.0
from transformers import TrainerCallback
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == {step}:
            os.kill(os.getpid(), 9)
original = loop.train
loop.train = lambda *a, **k: original(*a, **dict(k, callbacks=[Kill()]))
import bakes
bakes.distilled(Path({folder!r}), Path({vector!r}), Path({asked!r}), Path({out!r}))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(
    folder: Path, vector: SteeringVector, asked: Path, tmp_path: Path, forking: Forking
) -> None:
    """In processes of their own: in which order libraries are loaded can change the last bit of a product."""
    vector.save(tmp_path / "v.safetensors")

    def run(out: Path, step: int) -> int:
        given = {"folder": folder, "vector": tmp_path / "v.safetensors", "asked": asked, "out": out}
        script = RUN.format(tests=str(Path(__file__).parent), step=step, **{k: str(v) for k, v in given.items()})
        done = forking.run(script, tmp_path)
        assert done.codes[0] in (0, -signal.SIGKILL), done.stderr
        return done.codes[0]

    out = tmp_path / "out"
    assert run(tmp_path / "whole", 0) == 0
    assert run(out, 17) == -signal.SIGKILL
    assert not out.exists()
    assert (work.path_of(out) / "checkpoints" / "checkpoint-10").is_dir()
    with pytest.raises(UsageError, match="another run, which differs in settings"):
        distilled(folder, tmp_path / "v.safetensors", asked, out, settings={"steps": 31})
    assert run(out, 0) == 0
    assert files(out)["model.safetensors"] == files(tmp_path / "whole")["model.safetensors"]
    assert not work.path_of(out).exists()


def test_a_run_that_was_killed_behind_its_training_trains_no_more(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where patience ran out: how many evaluations were waited is part of a checkpoint."""
    mix = NO_REPLAY
    for name, settings in (("all", {"steps": 20}), ("early", {"steps": 40, "patience": 1, "lr": 1e-30})):
        whole = imitating(texts[0], folder, tmp_path / name, settings=settings, replay=mix)
        expected = bake(whole)
        made = imitating(texts[0], folder, tmp_path / f"{name} again", settings=settings, replay=mix)
        with monkeypatch.context() as patched:
            patched.setattr(baking.result, "save_trained", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                bake(made)
        with monkeypatch.context() as patched:
            patched.setattr(loop.BakeTrainer, "training_step", lambda *_: pytest.fail("it trains"))
            again = bake(made)
        assert again["steps"] == expected["steps"]
        assert (expected["steps"] < settings["steps"]) == (name == "early")
        assert files(tmp_path / f"{name} again")["model.safetensors"] == files(tmp_path / name)["model.safetensors"]


@pytest.mark.parametrize("state", [None, '{"epoch": 0.5, "global_st'], ids=["no state", "half a state"])
def test_a_checkpoint_whose_writing_was_interrupted_is_passed_over(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str | None
) -> None:
    settings = {"steps": 4, "evaluate_every": 2}
    bake(imitating(texts[0], folder, tmp_path / "whole", settings=settings, replay=NO_REPLAY))
    made = imitating(texts[0], folder, tmp_path / "out", settings=settings, replay=NO_REPLAY)
    with monkeypatch.context() as patched:
        patched.setattr(baking.result, "save_trained", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            bake(made)
    last = work.path_of(made.out) / "checkpoints" / "checkpoint-4"
    (last / "trainer_state.json").unlink()  # the Trainer writes it last
    if state is not None:
        (last / "trainer_state.json").write_text(state)
    bake(made)
    assert files(made.out)["model.safetensors"] == files(tmp_path / "whole")["model.safetensors"]


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_frozen_contexts_are_those_of_an_uninterrupted_run(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 24, "evaluate_every": 6}
    mix = Replay(texts[1], 0.25)
    whole, made = (
        imitating(texts[0], folder, tmp_path / name, context="frozen", settings=settings, replay=mix)
        for name in ("a", "b")
    )
    bake(whole)
    step, steps = loop.BakeTrainer.training_step, [0]

    def interrupted(*given: Any, **more: Any) -> Any:
        steps[0] += 1
        if steps[0] == 16:
            raise KeyboardInterrupt
        return step(*given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(loop.BakeTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bake(made)
    bake(made)
    assert files(tmp_path / "a")["model.safetensors"] == files(tmp_path / "b")["model.safetensors"]


def test_another_dtype_is_another_run(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    made = imitating(texts[0], folder, tmp_path / "out", replay=NO_REPLAY)
    identity = baking.job_of(made, imitate.mode(made)).identity
    other = replace(made, dtype="bfloat16")
    with (
        pytest.raises(KeyboardInterrupt),
        work.work_folder(made.out, identity),
    ):
        raise KeyboardInterrupt
    with pytest.raises(UsageError, match="differs in dtype"):
        bake(other)
