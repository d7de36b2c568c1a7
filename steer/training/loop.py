"""Training on samples with transformers' Trainer, which does resuming, gradient accumulation, logging and several GPUs;
the loss, the optimisers, and the stop at a loss that is not finite or jumps are ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from probes.seeds import child_seed
from steer.training import optimisers
from steer.training.data.samples import BEHAVIOUR, GENERAL, Sample
from steer.training.distributed import processes, sharding
from steer.training.objectives.protocol import Objective, ObjectiveSettings
from steer.training.requests import DECAYING, GRID, TrainingSettings
from vectors.errors import SteerError, UsageError
from vectors.events import Event, OnEvent, ignore

SPIKE = 8.0  # training stops at a loss above this many times the median of the last losses
STEADY = 10  # losses in that median


class Trained(NamedTuple):
    """How a run went: metrics by step, the steps done, the lowest held-out loss and its step, and the seconds."""

    history: list[dict[str, float]]
    steps: int
    best: float
    best_step: int
    seconds: float


class TrainingError(SteerError):
    """The loss is not finite, or jumped far above its recent median."""


def problems_of_settings(settings: TrainingSettings) -> list[str]:
    """What is wrong beyond ranges and choices, one sentence each. Raises UsageError for an unknown optimiser."""
    problems = []
    if settings.report_to != "none":
        from transformers.integrations import get_available_reporting_integrations

        installed = get_available_reporting_integrations()
        if settings.report_to not in installed:
            problems.append(
                f"--report-to {settings.report_to} is not installed; use one of none, {', '.join(installed)}"
            )
    if not settings.beta > 0:
        problems.append(f"beta is {settings.beta}, not above 0")
    return problems + optimisers.problems_of(
        settings.optimiser, lr=_rate(settings), weight_decay=settings.weight_decay, **settings.options
    )


def _rate(settings: TrainingSettings) -> float:
    return GRID[0] if settings.lr is None else settings.lr


def evaluation_interval(settings: TrainingSettings) -> int:
    """Steps between two evaluations on held-out samples, and two checkpoints."""
    return settings.evaluate_every or max(1, min(50, settings.total_steps // 6))


class _Samples(Dataset[Sample]):
    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


class BakeTrainer(Trainer):
    """The Trainer with our loss and optimisers. `forward(model, batch)` gives the logits that the loss takes."""

    def __init__(
        self, objective: Objective, settings: TrainingSettings, forward: Callable[..., Any], pad: int, **options: Any
    ) -> None:
        super().__init__(data_collator=lambda samples: objective.collate(samples, pad), **options)
        self.objective, self.settings, self.forward = objective, settings, forward
        self.model_accepts_loss_kwargs = False  # our loss is a mean over samples already

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The objective on one batch."""
        loss = self.objective.loss(inputs, self.forward(model, inputs), ObjectiveSettings(self.settings.beta))
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        """The loss on held-out samples."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser that the settings name, in place of the Trainer's."""
        if self.optimizer is None:
            self.optimizer: Any = optimisers.create(
                self.settings.optimiser, (model or self.model).named_parameters(), lr=self.args.learning_rate,
                weight_decay=self.settings.weight_decay, seed=self.settings.seed, **self.settings.options,
            )  # fmt: skip
        return self.optimizer


class _Monitor(TrainerCallback):
    """Records the history, reports progress, and stops at a loss that is not finite or jumps."""

    def __init__(self, on_event: OnEvent, held_out: int) -> None:
        self.on_event, self.history, self.failed, self.held_out = on_event, list[dict[str, float]](), "", held_out
        self.losses: list[float] = []

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.history = [_metrics(entry) for entry in state.log_history]

    def on_log(self, _args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        entry = _metrics({**logs, "step": state.global_step})
        self.history.append(entry)
        loss = entry.get("loss")
        if loss is not None:
            recent_median = median(self.losses[-STEADY:]) if len(self.losses) >= STEADY else math.inf
            if not math.isfinite(loss):
                self.failed = f"the loss is {loss} at step {state.global_step}"
            elif loss > SPIKE * max(recent_median, 0.05):
                self.failed = (
                    f"the loss jumped from about {recent_median:.3g} to {loss:.3g} at step {state.global_step}"
                )
            self.losses.append(loss)
            if self.failed:  # these weights must not become the checkpoint to resume from
                control.should_training_stop, control.should_save = True, False
        metrics = {key: value for key, value in entry.items() if key != "step"}
        if f"eval_{BEHAVIOUR}_loss" in metrics:
            metrics["held_out_samples"] = self.held_out
        self.on_event(Event("training", state.global_step, state.max_steps, "step", metrics))


def _metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    names = ("step", "loss", "grad_norm", "learning_rate", f"eval_{BEHAVIOUR}_loss", f"eval_{GENERAL}_loss")
    return {key: float(entry[key]) for key in names if key in entry}


class Data(NamedTuple):
    """Samples to train on and held-out samples; `pad` is the id that fills rows.

    Unless `shuffled`, batches keep the samples' order.
    """

    train: Sequence[Sample]
    held_out: Sequence[Sample]
    pad: int
    shuffled: bool = True


class Folders(NamedTuple):
    """Folders of a run: checkpoints, and TensorBoard's logs, whose folder name is the run's name in other trackers."""

    checkpoints: Path
    logs: Path


def train(
    model: Any,
    data: Data,
    objective: Objective,
    settings: TrainingSettings,
    folders: Folders,
    *,
    forward: Callable[..., Any],
    on_event: OnEvent = ignore,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train `model` in place; it ends with the weights that had the lowest held-out loss.

    Resumes from the last checkpoint in `folders.checkpoints`, if there is one. Raises TrainingError, which names the
    last good checkpoint, for a loss that is not finite or jumps.
    """
    started = time.monotonic()
    folder, every, world_size = folders.checkpoints, evaluation_interval(settings), processes.count()
    held_out = {kind: _Samples([s for s in data.held_out if s.kind == kind]) for kind in (BEHAVIOUR, GENERAL)}
    held_out = {kind: samples for kind, samples in held_out.items() if len(samples)}
    steps = settings.total_steps
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=settings.batch // world_size,
        per_device_eval_batch_size=settings.batch, gradient_accumulation_steps=settings.accumulate,
        learning_rate=_rate(settings), weight_decay=settings.weight_decay,
        warmup_steps=int(settings.warmup * steps), lr_scheduler_type=settings.schedule,
        max_grad_norm=settings.clip, logging_strategy="steps", logging_steps=1, logging_nan_inf_filter=False,
        eval_strategy="steps", eval_steps=every, save_strategy="steps", save_steps=every, save_total_limit=2,
        load_best_model_at_end=True, metric_for_best_model=f"eval_{BEHAVIOUR}_loss", greater_is_better=False,
        remove_unused_columns=False, disable_tqdm=True,
        **sharding.trainer_arguments(model, settings.sharded, settings.checkpointing),
        restore_callback_states_from_checkpoint=True,
        lr_scheduler_kwargs={"num_decay_steps": max(1, steps // 5)} if settings.schedule == DECAYING else {},
        report_to="none" if settings.report_to == "tensorboard" else settings.report_to, run_name=folders.logs.name,
        project="steer", seed=child_seed(settings.seed, "train") % 2**31, dataloader_pin_memory=False,
        prediction_loss_only=True, label_names=[], log_level="error", log_level_replica="error",
        train_sampling_strategy="random" if data.shuffled else "sequential",
        use_cpu=next(model.parameters()).device.type == "cpu", ddp_find_unused_parameters=False,
        ddp_timeout=int(processes.TIMEOUT.total_seconds()),
    )  # fmt: skip
    # One device per process: with several the Trainer would use nn.DataParallel, which can't split our batches.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    monitor = _Monitor(on_event, len(held_out.get(BEHAVIOUR, ())))
    if settings.report_to == "tensorboard":
        callbacks = [*callbacks, _tensorboard(folders.logs)]
    trainer = BakeTrainer(
        objective, settings, forward, data.pad, model=model, args=arguments, train_dataset=_Samples(data.train),
        eval_dataset=held_out, callbacks=[monitor, EarlyStoppingCallback(settings.patience), *callbacks],
    )  # fmt: skip
    _be_quiet(trainer)
    last_checkpoint = _last_checkpoint(folder)
    final_state = _final_state(last_checkpoint, settings)
    if final_state is None:
        trainer.train(resume_from_checkpoint=last_checkpoint)
    else:  # an earlier run was killed after its training: train no further
        trainer.state, monitor.history = final_state, [_metrics(entry) for entry in final_state.log_history]
        trainer._load_best_model()
    if monitor.failed:
        last_good = _last_checkpoint(folder)
        where = f"; the last good checkpoint is {last_good}" if last_good else "; there is no checkpoint yet"
        raise TrainingError(
            f"{monitor.failed}, so training stopped{where}",
            f"lower the learning rate (--lr, or --lr auto), and remove {folder.parent} first: rm -r {folder.parent}",
        )
    best = trainer.state.best_metric
    return Trained(
        # The Trainer closes with its own timings, of which a step alone remains; a resumed run may lack that entry.
        [entry for entry in monitor.history if len(entry) > 1],
        trainer.state.global_step,
        float(math.nan if best is None else best),
        trainer.state.best_global_step or 0,
        time.monotonic() - started,
    )


def _last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in a folder: the Trainer writes its state last, so an interrupted one lacks it."""
    numbered = [(int(path.name.rpartition("-")[2]), path) for path in folder.glob("checkpoint-[0-9]*")]
    for _, path in sorted(numbered, reverse=True):
        with contextlib.suppress(OSError, ValueError, TypeError):
            TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
            return str(path)
    return None


def _final_state(checkpoint: str | None, settings: TrainingSettings) -> TrainerState | None:
    """The state of a checkpoint at which training had ended (all steps done, or patience ran out), else None."""
    if checkpoint is None:
        return None
    state: TrainerState = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    stopping = (state.stateful_callbacks or {}).get(EarlyStoppingCallback.__name__, {}).get("attributes", {})
    evaluations_without_progress = stopping.get("early_stopping_patience_counter", 0)
    return (
        state
        if state.global_step >= settings.total_steps or evaluations_without_progress >= settings.patience
        else None
    )


def _tensorboard(folder: Path) -> TrainerCallback:
    """transformers' callback, made to log in `folder`: its default is among the checkpoints, which are removed."""
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = callback.logging_dir or str(folder)  # TENSORBOARD_LOGGING_DIR takes precedence
    return callback


def _be_quiet(trainer: Trainer) -> None:
    """Stop the Trainer from printing: progress is reported through `on_event`."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def whole_pass(model: Any, batch: Mapping[str, Any]) -> Any:
    """The logits [count, vocabulary] before each token of a completion; the head runs on the positions `keep` only."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False,
        logits_to_keep=batch["keep"],
    ).logits  # fmt: skip
    return logits[batch["counts"]]


def sweep(train_at: Callable[[TrainingSettings, str], Trained], settings: TrainingSettings) -> dict[str, float]:
    """The lowest held-out loss at each learning rate of `GRID`, each trained for an eighth of the steps.

    `train_at(settings, name)` trains a run of that name. Raises UsageError when training fails at every rate.
    """
    losses: dict[str, float] = {}
    steps, every = max(4, settings.total_steps // 8), max(2, settings.total_steps // 16)
    for lr in GRID:
        short = dataclasses.replace(settings, lr=lr, steps=steps, evaluate_every=every, report_to="none")
        try:
            losses[f"{lr:g}"] = train_at(short, f"lr-{lr:g}").best
        except TrainingError:
            losses[f"{lr:g}"] = math.inf
    if not any(map(math.isfinite, losses.values())):
        raise UsageError("training fails at every learning rate of the grid", f"try one below {GRID[0]:g}: --lr 1e-5")
    return losses
