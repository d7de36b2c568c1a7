"""Training on samples: transformers' Trainer drives it, so that resuming, accumulation, logging and several GPUs come
from there; the loss, the optimisers and the guards are ours.
"""

from __future__ import annotations

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
from transformers.trainer_utils import get_last_checkpoint

from probes.seeds import child_seed
from steer.training import optimisers
from steer.training.data.samples import BEHAVIOUR, GENERAL, Sample
from steer.training.distributed import processes, sharding
from steer.training.objectives.protocol import Objective, ObjectiveSettings
from vectors.errors import SteerError, UsageError

SPIKE = 8.0  # times the median of the last losses, and beyond
STEADY = 10  # losses that the median is taken over


class Settings(NamedTuple):
    """The numbers of a training run. `lr` None sweeps a short grid."""

    steps: int = 200
    batch: int = 8
    accumulate: int = 1
    optimiser: str = "adamw"
    options: Mapping[str, Any] = {}
    lr: float | None = 3e-4
    weight_decay: float = 0.0
    warmup: float = 0.1  # share of the steps
    schedule: str = "cosine"
    clip: float = 1.0  # of the gradient's norm
    evaluate: int = 0  # steps between two looks at what was held out; 0 chooses
    patience: int = 5  # looks without progress, after which it stops
    checkpointing: bool = False
    seed: int = 0
    report_to: str = "none"
    beta: float = 0.1  # of preferences
    sharded: bool = False  # weights, gradients and state are cut over the processes

    def identity(self) -> dict[str, Any]:
        """What a run follows from: the same as before there was a choice, where it is the usual one."""
        return {name: value for name, value in self._asdict().items() if name != "sharded" or value}


class Trained(NamedTuple):
    """What a run was like: the history of losses by step, and where the best checkpoint was."""

    history: list[dict[str, float]]
    steps: int
    best: float
    seconds: float


class TrainingError(SteerError):
    """The loss became NaN, or leapt."""


GRID = (1e-4, 3e-4, 1e-3)
DECAYING = "warmup_stable_decay"  # over the last fifth of the steps
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", DECAYING)


def check(settings: Settings) -> list[str]:
    """What is wrong with the numbers, one sentence each. Raises UsageError for an optimiser that there is not."""
    problems = []
    for name, value, low in [
        ("steps", settings.steps, 1), ("the batch size", settings.batch, 1), ("--accumulate", settings.accumulate, 1),
        ("--evaluate-every", settings.evaluate, 0), ("--patience", settings.patience, 1),
    ]:  # fmt: skip
        if value < low:
            problems.append(f"{name} is {value}, not at least {low}")
    if not 0 <= settings.warmup < 1:
        problems.append(f"the warm-up {settings.warmup} is not in [0, 1)")
    if settings.schedule not in SCHEDULES:
        problems.append(f"there is no schedule {settings.schedule!r}; there are {', '.join(SCHEDULES)}")
    if settings.report_to != "none":
        from transformers.integrations import get_available_reporting_integrations

        there = get_available_reporting_integrations()
        if settings.report_to not in there:
            problems.append(f"--report-to {settings.report_to} is not installed; there are none, {', '.join(there)}")
    if settings.lr is not None and not settings.lr > 0:
        problems.append(f"--lr is {settings.lr:g}, not above 0")
    if not settings.beta > 0:
        problems.append(f"beta is {settings.beta}, not above 0")
    return problems + optimisers.problems_of(
        settings.optimiser, lr=_rate(settings), weight_decay=settings.weight_decay, **settings.options
    )


def _rate(settings: Settings) -> float:
    return GRID[0] if settings.lr is None else settings.lr


def looks(settings: Settings) -> int:
    """Steps between two looks at what was held out, and two checkpoints."""
    return settings.evaluate or max(1, min(50, settings.steps // 6))


class _Samples(Dataset[Sample]):
    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> Sample:
        return self.samples[place]


class BakeTrainer(Trainer):
    """The Trainer with our loss and optimisers. `forward(model, batch)` gives the logits that the loss takes."""

    def __init__(
        self, objective: Objective, settings: Settings, forward: Callable[..., Any], pad: int, **given: Any
    ) -> None:
        super().__init__(data_collator=lambda samples: objective.collate(samples, pad), **given)
        self.objective, self.settings, self.forward = objective, settings, forward
        self.model_accepts_loss_kwargs = False  # our loss is a mean over samples already

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The objective on one batch."""
        loss = self.objective.loss(inputs, self.forward(model, inputs), ObjectiveSettings(self.settings.beta))
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        """The loss on what was held out."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Ours, by name."""
        if self.optimizer is None:
            self.optimizer: Any = optimisers.create(
                self.settings.optimiser, (model or self.model).named_parameters(), lr=self.args.learning_rate,
                weight_decay=self.settings.weight_decay, seed=self.settings.seed, **self.settings.options,
            )  # fmt: skip
        return self.optimizer


class _Watch(TrainerCallback):
    """Keeps the history, tells how it goes, and stops at a loss that is no number or leaps."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self.tell, self.history, self.failed = tell, list[dict[str, float]](), ""
        self.losses: list[float] = []
        self.began = self.began_at = 0.0

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.began, self.began_at = time.monotonic(), state.global_step
        self.history = [_numbers(entry) for entry in state.log_history]

    def on_log(self, _args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        entry = _numbers({**logs, "step": state.global_step})
        self.history.append(entry)
        loss = entry.get("loss")
        if loss is not None:
            usual = median(self.losses[-STEADY:]) if len(self.losses) >= STEADY else math.inf
            if not math.isfinite(loss):
                self.failed = f"the loss is {loss} at step {state.global_step}"
            elif loss > SPIKE * max(usual, 0.05):
                self.failed = f"the loss leapt from about {usual:.3g} to {loss:.3g} at step {state.global_step}"
            self.losses.append(loss)
            if self.failed:  # and these weights are no checkpoint to go on from
                control.should_training_stop, control.should_save = True, False
        done = state.global_step - self.began_at
        left = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step) if done > 0 else math.inf
        self.tell({**entry, "steps": state.max_steps, "left": left})


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    kept = ("step", "loss", "grad_norm", "learning_rate", f"eval_{BEHAVIOUR}_loss", f"eval_{GENERAL}_loss")
    return {key: float(entry[key]) for key in kept if key in entry}


def train(
    model: Any,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    objective: Objective,
    settings: Settings,
    folder: Path,
    logged: Path,
    *,
    forward: Callable[..., Any],
    pad: int,
    tell: Callable[[dict[str, Any]], None] = lambda entry: None,
    shuffled: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train `model` in place; it ends as the best of what was looked at on the way.

    `shuffled` False keeps the samples in their order, so that the same batches come again. Checkpoints lie in
    `folder`, and what lies there already is gone on from. `logged` is where TensorBoard's files go, whose name is that
    of the run for other trackers. Raises TrainingError, which names the last
    good checkpoint, for a loss that is no number or leaps.
    """
    started = time.monotonic()
    every, share = looks(settings), processes.count()
    looked_at = {kind: _Samples([s for s in held_out if s.kind == kind]) for kind in (BEHAVIOUR, GENERAL)}
    looked_at = {kind: found for kind, found in looked_at.items() if len(found)}
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=settings.steps, per_device_train_batch_size=settings.batch // share,
        per_device_eval_batch_size=settings.batch, gradient_accumulation_steps=settings.accumulate,
        learning_rate=_rate(settings), weight_decay=settings.weight_decay,
        warmup_steps=int(settings.warmup * settings.steps), lr_scheduler_type=settings.schedule,
        max_grad_norm=settings.clip, logging_strategy="steps", logging_steps=1, logging_nan_inf_filter=False,
        eval_strategy="steps", eval_steps=every, save_strategy="steps", save_steps=every, save_total_limit=2,
        load_best_model_at_end=True, metric_for_best_model=f"eval_{BEHAVIOUR}_loss", greater_is_better=False,
        remove_unused_columns=False, disable_tqdm=True,
        **sharding.trainer_arguments(model, settings.sharded, settings.checkpointing),
        restore_callback_states_from_checkpoint=True,
        lr_scheduler_kwargs={"num_decay_steps": max(1, settings.steps // 5)} if settings.schedule == DECAYING else {},
        report_to="none" if settings.report_to == "tensorboard" else settings.report_to, run_name=logged.name,
        project="steer", seed=child_seed(settings.seed, "train") % 2**31, dataloader_pin_memory=False,
        prediction_loss_only=True, label_names=[], log_level="error", log_level_replica="error",
        train_sampling_strategy="random" if shuffled else "sequential",
        use_cpu=next(model.parameters()).device.type == "cpu", ddp_find_unused_parameters=False,
        ddp_timeout=int(processes.TIMEOUT.total_seconds()),
    )  # fmt: skip
    # One process, one device: over several the Trainer would cut each batch for nn.DataParallel; ours are not for it.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    watch = _Watch(tell)
    if settings.report_to == "tensorboard":
        callbacks = [*callbacks, _tensorboard(logged)]
    trainer = BakeTrainer(
        objective, settings, forward, pad, model=model, args=arguments, train_dataset=_Samples(samples),
        eval_dataset=looked_at, callbacks=[watch, EarlyStoppingCallback(settings.patience), *callbacks],
    )  # fmt: skip
    _be_quiet(trainer)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    ended = _ended(last, settings)
    if ended is None:
        trainer.train(resume_from_checkpoint=last)
    else:  # by a run that was killed behind its training: not one step more
        trainer.state, watch.history = ended, [_numbers(entry) for entry in ended.log_history]
        trainer._load_best_model()
    if watch.failed:
        kept = get_last_checkpoint(str(folder))
        where = f"; the last good checkpoint is {kept}" if kept else "; there is no checkpoint yet"
        raise TrainingError(
            f"{watch.failed}, so training stopped{where}",
            f"lower the learning rate (--lr, or --lr auto), and remove {folder.parent} first: rm -r {folder.parent}",
        )
    best = trainer.state.best_metric
    return Trained(
        watch.history, trainer.state.global_step, float(math.nan if best is None else best), time.monotonic() - started
    )


def _ended(checkpoint: str | None, settings: Settings) -> TrainerState | None:
    """The state of a checkpoint behind which there is nothing to train: all steps are done, or patience ran out."""
    if checkpoint is None:
        return None
    state: TrainerState = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    early = (state.stateful_callbacks or {}).get(EarlyStoppingCallback.__name__, {}).get("attributes", {})
    waited = early.get("early_stopping_patience_counter", 0)
    return state if state.global_step >= settings.steps or waited >= settings.patience else None


def _tensorboard(folder: Path) -> TrainerCallback:
    """transformers' own, whose files would lie among the checkpoints, which are removed in the end."""
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = callback.logging_dir or str(folder)  # unless TENSORBOARD_LOGGING_DIR says where
    return callback


def _be_quiet(trainer: Trainer) -> None:
    """Without the Trainer's own printing: what is worth saying goes through `tell`."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def whole_pass(model: Any, batch: Mapping[str, Any]) -> Any:
    """The logits [count, vocabulary] before each token of a completion; the head is computed near them alone."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False,
        logits_to_keep=batch["keep"],
    ).logits  # fmt: skip
    return logits[batch["counts"]]


def sweep(
    make: Callable[[], Any], run: Callable[[Any, Settings, Path], Trained], settings: Settings, folder: Path
) -> dict[str, float]:
    """What each learning rate of a short grid gives after an eighth of the steps: the least held-out loss.

    Raises UsageError when none of them trains at all.
    """
    found: dict[str, float] = {}
    for lr in GRID:
        short = settings._replace(
            lr=lr, steps=max(4, settings.steps // 8), evaluate=max(2, settings.steps // 16), report_to="none"
        )
        try:
            found[f"{lr:g}"] = run(make(), short, folder / f"lr-{lr:g}").best
        except TrainingError:
            found[f"{lr:g}"] = math.inf
    if not any(map(math.isfinite, found.values())):
        raise UsageError("no learning rate of the grid trains", f"try one below {GRID[0]:g}: --lr 1e-5")
    return found
