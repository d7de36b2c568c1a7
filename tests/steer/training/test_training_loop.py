"""The training loop: frozen contexts, accumulation, learning rates, losses that stop it, and logs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from bakes import NO_REPLAY, distilled, imitating
from transformers import AutoModelForCausalLM

from probes.models.completions import Completion
from steer.training import loop, work
from steer.training.api import bake
from steer.training.data.samples import hard_targets
from steer.training.frozen_pass import FrozenPass
from steer.training.objectives import divergence
from steer.training.requests import AdapterSettings
from vectors.steering import SteeringVector


def test_a_frozen_context_trains_completions_alone(
    folder: Path, texts: tuple[Path, Path], held_out: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = imitating(
        texts[0], folder, tmp_path / "out", context="frozen", settings={"steps": 40, "evaluate_every": 8},
        replay=NO_REPLAY, pos=held_out[0], neg=held_out[1],
    )  # fmt: skip
    report = bake(made)
    assert report["models"]["baked"]["margin"] > report["models"]["base"]["margin"] + 0.3
    assert len(report["staleness"]) > 3
    assert max(report["staleness"]) > 0


def test_the_frozen_pass_gives_the_logits_of_the_whole_pass(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [Completion(ids, [9, 8, 7]) for ids in pico.sequences(3, 4, 12)]
    batch = divergence.collate(hard_targets(rows), 0)
    frozen, whole = FrozenPass()(model.train(), batch), loop.whole_pass(model.eval(), batch)
    assert torch.allclose(frozen, whole, atol=1e-4)


@pytest.mark.parametrize("optimiser", ["apollo", "muon"])
def test_all_weights_can_be_trained(
    optimiser: str, folder: Path, texts: tuple[Path, Path], held_out: tuple[Path, Path], tmp_path: Path
) -> None:
    made = imitating(texts[0], folder, tmp_path / "out", adapter=AdapterSettings(full=True), replay=NO_REPLAY,
        settings={"steps": 20, "lr": 3e-3, "optimiser": optimiser}, pos=held_out[0], neg=held_out[1],
    )  # fmt: skip
    report = bake(made)
    assert report["models"]["baked"]["margin"] > report["models"]["base"]["margin"] + 0.1


def test_accumulated_batches_are_one_large_batch(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    found = []
    for name, batch, accumulate in (("a", 8, 1), ("b", 2, 4)):
        settings = {"steps": 4, "batch": batch, "accumulate": accumulate, "clip": 0.0, "evaluate_every": 4}
        made = imitating(texts[0], folder, tmp_path / name, settings=settings, replay=NO_REPLAY, as_="lora")
        found.append([e for e in bake(made)["history"] if "grad_norm" in e])
    assert len(found[0]) == 4
    # Losses and gradients, not weights: Adam makes as much of rounding as of a gradient where that is near zero. The
    # first two steps: the third ends an epoch, whose last batches are fewer than are accumulated.
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = loop.whole_pass, [0]

    def failing(model: Any, batch: Any) -> Any:
        calls[0] += model.training
        return original(model, batch) * (math.nan if calls[0] > 14 else 1.0)

    monkeypatch.setattr(loop, "whole_pass", failing)
    made = imitating(texts[0], folder, tmp_path / "out", replay=NO_REPLAY)
    with pytest.raises(loop.TrainingError, match="the loss is nan at step 15, so training stopped"):
        bake(made)
    assert (work.path_of(made.out) / "checkpoints" / "checkpoint-10").is_dir()
    assert not made.out.exists()


def test_a_loss_that_leaps_stops(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = loop.whole_pass, [0]

    def leaping(model: Any, batch: Any) -> Any:
        calls[0] += model.training
        return original(model, batch) * (300.0 if calls[0] > 20 else 1.0)

    monkeypatch.setattr(loop, "whole_pass", leaping)
    made = imitating(texts[0], folder, tmp_path / "out", replay=NO_REPLAY)
    with pytest.raises(loop.TrainingError, match="the loss jumped"):
        bake(made)


def test_learning_rates_are_tried_on_a_short_grid(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    made = imitating(texts[0], folder, tmp_path / "out", settings={"lr": None, "steps": 32}, replay=NO_REPLAY)
    report = bake(made)
    assert list(report["learning_rates"]) == ["0.0001", "0.0003", "0.001"]
    assert min(report["learning_rates"], key=report["learning_rates"].get) == "0.001"


def test_learning_rates_are_tried_for_a_teacher_that_acts_above_the_first_layer(
    folder: Path, vector: SteeringVector, asked: Path, tmp_path: Path
) -> None:
    report = distilled(folder, vector, asked, tmp_path / "out", settings={"lr": None, "steps": 16})
    assert len(report["learning_rates"]) == 3


def test_tensorboard_keeps_the_curves(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = imitating(texts[0], folder, tmp_path / "out", replay=NO_REPLAY, settings={"report_to": "tensorboard"})
    report = bake(made)
    found = EventAccumulator(str(tmp_path / "runs" / "out")).Reload().Scalars("train/loss")
    history = [(entry["step"], entry["loss"]) for entry in report["history"] if "loss" in entry]
    assert [(event.step, pytest.approx(event.value)) for event in found] == history
