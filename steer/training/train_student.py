"""Trains one student, at the requested learning rate or at the best one of a short grid."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from probes.models.loading import LoadedModel, load
from steer.training import loop, student
from steer.training.data.samples import Sample, Samples
from steer.training.distributed import processes, sharding
from steer.training.frozen_pass import FrozenPass
from steer.training.mode import Mode
from steer.training.requests import TrainingRequest, TrainingSettings
from vectors.documents import json_text
from vectors.errors import ArtifactError
from vectors.events import Event, OnEvent
from vectors.storage.files import digest_json, write_atomically


class Student(NamedTuple):
    """A trained model, and how its training went."""

    model: Any
    training: loop.Trained
    learning_rates: dict[str, float | None] | None = None  # held-out loss by rate, if a grid was tried
    staleness: list[float] | None = None  # of contexts, in nats, with --context frozen


class _Maker:
    """Makes students of one base: from the model in memory, or from a copy where the base is needed again."""

    def __init__(self, request: TrainingRequest, mode: Mode, loaded: LoadedModel) -> None:
        self.request, self.loaded, self.lora = request, loaded, request.adapter.lora(mode.first_layer)
        self.adapted: Any = None

    def make(self, *, copy: bool) -> Any:
        """A student before training. `copy` loads the base again if training would change the model in memory."""
        request, seed = self.request, self.request.settings.seed
        if self.lora is None or request.settings.sharded:
            path = self.loaded.source.path
            model = load(path, request.device, request.dtype).model if copy else self.loaded.model
            return student.adapted(model, self.lora, seed) if self.lora else student.freed(model)
        if self.adapted is not None:
            self.adapted.unload()  # PEFT inserts its layers into the model itself
        self.adapted = student.adapted(self.loaded.model, self.lora, seed)
        return self.adapted


def train_student(
    request: TrainingRequest, mode: Mode, loaded: LoadedModel, samples: Samples, folder: Path, on_event: OnEvent
) -> Student:
    """Train a student in `folder`, whose checkpoints it resumes from. Raises TrainingError, UsageError."""
    settings = request.settings.for_samples(len(samples.train))
    request = dataclasses.replace(request, settings=settings)
    maker = _Maker(request, mode, loaded)
    run = _Run(request, mode, loaded, samples, on_event)
    rates = None
    if settings.lr is None:
        rates = _swept(run, maker, folder, on_event)
        settings = dataclasses.replace(settings, lr=float(min(rates, key=rates.__getitem__)))
    on_event(Event(f"training at learning rate {settings.lr:g}, {settings.total_steps} steps"))
    model = maker.make(copy=rates is not None)
    trained = run(model, settings, folder / "checkpoints", folder.name)
    if settings.sharded:
        model = sharding.gathered(model, lambda: maker.make(copy=True))
    losses = {rate: loss if math.isfinite(loss) else None for rate, loss in rates.items()} if rates else None
    return Student(model, trained, losses, run.frozen.stale if run.frozen else None)


class _Run:
    """Trains models on the same samples, each with settings of its own."""

    def __init__(
        self, request: TrainingRequest, mode: Mode, loaded: LoadedModel, samples: Samples, on_event: OnEvent
    ) -> None:
        self.request, self.mode, self.samples, self.on_event = request, mode, samples, on_event
        self.pad = loaded.tokenizer.pad_token_id or 0
        self.frozen: FrozenPass | None = None

    def __call__(self, model: Any, settings: TrainingSettings, folder: Path, name: str) -> loop.Trained:
        """Train one model, with checkpoints in `folder`; `name` is the name of its work folder."""
        train: list[Sample] = self.samples.train
        if self.request.context == "frozen":
            # One order for all epochs, so that batches repeat; by digest, so that the kinds of samples are mixed.
            train = sorted(train, key=lambda sample: digest_json([self.request.settings.seed, sample.digest]))
            self.frozen = FrozenPass(loop.evaluation_interval(settings) * settings.accumulate)
        return loop.train(
            model, loop.Data(train, self.samples.held_out, self.pad, shuffled=self.frozen is None),
            self.mode.objective, settings, loop.Folders(folder, self._logs(name)), on_event=self.on_event,
            forward=self.frozen or loop.whole_pass,
        )  # fmt: skip

    def _logs(self, work: str) -> Path:
        """The folder of TensorBoard's logs: beside the output, since the work folder is removed at the end."""
        out = self.request.out
        name = out.stem if self.request.as_ == "vector" else out.name
        return out.parent / "runs" / (f"{name}-{work}" if work == WITHOUT_REPLAY else name)


WITHOUT_REPLAY = "without-mix"  # folder of the second training; the name of its first release, so that old runs resume


def _swept(run: _Run, maker: _Maker, folder: Path, on_event: OnEvent) -> dict[str, float]:
    """The held-out loss at each learning rate, computed now or read from the run that is resumed."""
    file = folder / "rates.json"
    if file.is_file():
        rates: dict[str, float] = json_text.read(file, ArtifactError, f"remove {file}, so that they are tried again")
        if not isinstance(rates, dict) or not all(isinstance(loss, int | float) for loss in rates.values()):
            raise ArtifactError(f"{file} is damaged: it is no table of losses", f"remove {file}")
        return rates
    on_event(Event("trying learning rates"))
    rates = loop.sweep(
        lambda settings, name: run(maker.make(copy=True), settings, folder / "sweep" / name, folder.name),
        run.request.settings,
    )
    if processes.is_main():
        write_atomically(file, json.dumps(rates).encode())
    return rates
