"""Several processes train one student: as one process would, and only one of them writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import load_file

from steer.training.distributed import processes, sharding
from steer.training.modes import contrast
from vectors.errors import UsageError

TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "steer")
ONE = (sys.executable, "-m", "steer")
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
CUT = (*TWO[:-2], "cut.py")
BAKE = (
    "bake", "--mode", "train", "--data", "warm.jsonl", "--model", "model", "--replay", "0", "--steps", "12",
    "--evaluate-every", "4", "--lr", "1e-2", "--batch", "4", "--json",
)  # fmt: skip


@pytest.fixture
def here(tmp_path: Path) -> Path:
    pico.save(tmp_path / "model", "llama")
    words = ("sun", "rain", "warm", "cold", "yes", "no")
    lines = [{"prompt": f"{a} {b}?", "completion": f" the warm {b} and the {a}"} for a in words for b in words]
    (tmp_path / "warm.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "cut.py").write_text(ON_THE_CPU)
    return tmp_path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(here: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=here, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "cut", "more"),
    [
        (TWO, (), ()),
        (TWO, (), ("--full", "--optimiser", "apollo")),
        (CUT, ("--fsdp",), ()),
        (CUT, ("--fsdp",), ("--lr", "auto")),
        (CUT, ("--fsdp", "--checkpointing"), ("--full", "--dtype", "float32")),
    ],
    ids=["lora", "full", "lora-fsdp", "rates-fsdp", "full-fsdp"],
)
def test_two_train_the_student_that_one_would_have(
    here: Path, launcher: tuple[str, ...], cut: tuple[str, ...], more: tuple[str, ...]
) -> None:
    reports = []
    for name, command in (("one", (*ONE, *BAKE, *more)), ("two", (*launcher, *BAKE, *more, *cut))):
        done = run(here, *command, "-o", name)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout))
        assert done.stderr.count("training at learning rate") == 1
    one, two = reports
    assert [entry["step"] for entry in one["history"]] == [entry["step"] for entry in two["history"]]
    assert two["samples"] == one["samples"]
    for mine, other in zip(one["history"], two["history"], strict=True):
        assert mine == pytest.approx(other, rel=2e-3, abs=2e-5)
    assert two["models"]["baked"] == pytest.approx(one["models"]["baked"], rel=0.01)
    base, *made = (load_file(here / name / "model.safetensors") for name in ("model", "one", "two"))
    apart = sum(float((made[0][name] - made[1][name]).norm() ** 2) for name in base) ** 0.5
    moved = sum(float((made[0][name] - base[name]).norm() ** 2) for name in base) ** 0.5
    assert apart < 0.02 * moved
    assert not list(here.glob(".*.bake"))


def workers(launcher: int) -> list[int]:
    found = subprocess.run(["ps", "--ppid", str(launcher), "-o", "pid="], capture_output=True, text=True, check=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("command", [(*TWO, *BAKE), (*CUT, *BAKE, "--fsdp")], ids=["copies", "fsdp"])
def test_two_that_are_killed_go_on_where_they_were(command: tuple[str, ...], here: Path) -> None:
    whole = run(here, *command, "-o", "whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [*command, "-o", "out"], cwd=here, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 200
    while not (here / ".out.bake" / "checkpoints" / "checkpoint-4" / "trainer_state.json").is_file():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    for pid in [process.pid, *workers(process.pid)]:  # each worker leads a session of its own
        os.kill(pid, signal.SIGKILL)
    process.wait()
    again = run(here, *command, "-o", "out")
    assert again.returncode == 0, again.stderr
    assert "resuming a run that was interrupted" in again.stderr
    one, two = (load_file(here / name / "model.safetensors") for name in ("whole", "out"))
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
