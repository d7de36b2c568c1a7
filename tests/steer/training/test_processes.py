"""Several processes train one student: as one process would, and only one of them writes."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from forked import Forking
from safetensors.torch import load_file

from steer.training.distributed import processes, sharding
from steer.training.modes import contrast
from vectors.errors import UsageError

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "steer")
STEER = "from steer.cli import main; main()"
# accelerate cuts models over GPUs alone, though torch does it over processors as well: two of these stand for two GPUs.
ON_THE_CPU = """
import accelerate.state as state
from steer.cli import main

before = state.PartialState.__init__

def made(self, *args, **given):
    before(self, *args, **given)
    if self.distributed_type == state.DistributedType.MULTI_CPU:
        self.distributed_type = state.DistributedType.MULTI_GPU

state.PartialState.__init__ = made
main()
"""
# Stops after step 6, where it waits to be killed.
STOP = """
import os, time
from pathlib import Path
from transformers import TrainerCallback
from steer.training import loop

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 6:
            Path(f"stopped-{os.environ['RANK']}").touch()
            time.sleep(300)

train = loop.train
loop.train = lambda *given, **more: train(*given, **{**more, "callbacks": [Stop()]})
"""
BAKE = (
    "bake", "--mode", "train", "--data", "warm.jsonl", "--model", "model", "--replay", "0", "--steps", "12",
    "--evaluate-every", "4", "--lr", "1e-2", "--batch", "4", "--json",
)  # fmt: skip
Trained = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    pico.save(folder / "model", "llama")
    words = ("sun", "rain", "warm", "cold", "yes", "no")
    lines = [{"prompt": f"{a} {b}?", "completion": f" the warm {b} and the {a}"} for a in words for b in words]
    (folder / "warm.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def trained(here: Path, forking: Forking) -> Trained:
    """Trains the student in one process or in two, each command once; gives the folder and the report."""

    @functools.cache
    def train(processes: int, *more: str) -> tuple[Path, dict[str, Any]]:
        out = here / "-".join([str(processes), *(part.strip("-") for part in more)])
        sharded = "--fsdp" in more
        ranks = processes if processes > 1 else 0
        done = forking.run(ON_THE_CPU if sharded else STEER, here, (*BAKE, *more, "-o", out.name), ranks)
        assert set(done.codes) == {0}, done.stderr
        assert done.stderr.count("training at learning rate") == 1
        assert not list(here.glob(".*.bake"))
        return out, json.loads(done.stdout)

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "cut"),
    [
        ((), ()),
        (("--full", "--optimiser", "apollo"), ()),
        ((), ("--fsdp",)),
        (("--lr", "auto"), ("--fsdp",)),
        (("--full", "--dtype", "float32"), ("--fsdp", "--checkpointing")),
    ],
    ids=["lora", "full", "lora-fsdp", "rates-fsdp", "full-fsdp"],
)
def test_two_train_the_student_that_one_would_have(
    here: Path, trained: Trained, more: tuple[str, ...], cut: tuple[str, ...]
) -> None:
    (first, one), (second, two) = trained(1, *more), trained(2, *more, *cut)
    assert [entry["step"] for entry in one["history"]] == [entry["step"] for entry in two["history"]]
    assert two["samples"] == one["samples"]
    for mine, other in zip(one["history"], two["history"], strict=True):
        assert mine == pytest.approx(other, rel=2e-3, abs=2e-5)
    assert two["models"]["baked"] == pytest.approx(one["models"]["baked"], rel=0.01)
    base, *made = (load_file(folder / "model.safetensors") for folder in (here / "model", first, second))
    apart = sum(float((made[0][name] - made[1][name]).norm() ** 2) for name in base) ** 0.5
    moved = sum(float((made[0][name] - base[name]).norm() ** 2) for name in base) ** 0.5
    assert apart < 0.02 * moved


@pytest.mark.slow
def test_torchrun_starts_the_processes(here: Path, trained: Trained) -> None:
    command = [*TORCHRUN, *BAKE, "-o", "torchrun"]
    done = subprocess.run(
        command, cwd=here, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    forked, started = (load_file(folder / "model.safetensors") for folder in (trained(2)[0], here / "torchrun"))
    for name, tensor in forked.items():  # in which order libraries are loaded can change the last bit of a product
        torch.testing.assert_close(started[name], tensor, rtol=2e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [(), ("--fsdp",)], ids=["copies", "fsdp"])
def test_two_that_are_killed_go_on_where_they_were(
    cut: tuple[str, ...], here: Path, forking: Forking, trained: Trained
) -> None:
    whole, _ = trained(2, *cut)
    script, name = (ON_THE_CPU if cut else STEER), f"killed{len(cut)}"
    command, stopped = (*BAKE, *cut, "-o", name), [here / f"stopped-{rank}" for rank in range(2)]
    pids = forking.start(STOP + script, here, command, 2)
    end = time.monotonic() + 200
    while not all(file.exists() for file in stopped):
        assert time.monotonic() < end
        time.sleep(0.01)
    for file, pid in zip(stopped, pids, strict=True):
        file.unlink()
        os.kill(pid, signal.SIGKILL)
    assert forking.wait().codes == [-signal.SIGKILL] * 2
    assert (here / f".{name}.bake" / "checkpoints" / "checkpoint-4" / "trainer_state.json").is_file()
    again = forking.run(script, here, command, 2)
    assert set(again.codes) == {0}, again.stderr
    assert "resuming a run that was interrupted" in again.stderr
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, here / name))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_several_can_not_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.problems_of(7, "frozen") == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    found = " ".join(processes.problems_of(7, "frozen"))
    for part in ("a batch of 7 can't be shared by 2 processes", "--context frozen", "DeepSpeed"):
        assert part in found
    with pytest.raises(UsageError, match="--against trains in one process"):
        contrast.run(None)  # type: ignore[arg-type]


def test_what_cannot_be_sharded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sharding.problems_of(False, "apollo", True, "bfloat16", "frozen") == []
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    found = " ".join(sharding.problems_of(True, "apollo", True, "auto", "frozen"))
    for part in ("and there is one: torchrun", "which apollo needs whole", "in float32 only", "frozen"):
        assert part in found
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sharding.problems_of(True, "adamw", False, "auto", "full") == []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "give --fsdp" in sharding.problems_of(False, "adamw", False, "auto", "full")[0]
