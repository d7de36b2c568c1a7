"""What the requests of all bake modes have in common; the request of one mode stands in its file in modes/.

`steer bake` derives its options from these types. Nothing heavy is imported here, since `steer bake --help` reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vectors.errors import UsageError
from vectors.registry import plugins
from vectors.registry.options import option
from vectors.registry.values import read_assignments

REPLAY_SHARE = 0.25
PASSES, LEAST_STEPS, MOST_STEPS = 8, 8, 200  # the default number of steps: passes over the samples, within bounds
REPLAY_TOKENS = 48  # longest continuation that the model writes as replay data
GRID = (1e-4, 3e-4, 1e-3)  # the learning rates that --lr auto tries
DECAYING = "warmup_stable_decay"  # over the last fifth of the steps
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", DECAYING)
SCHEDULE_NAMES = ", ".join(SCHEDULES)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = ("all-linear",)


class Replay(NamedTuple):
    """Replay data: a file, or None for the model's own continuations; and its share of all samples."""

    path: Path | None = None
    share: float = REPLAY_SHARE


class Lora(NamedTuple):
    """PEFT's LoRA settings: rank, alpha, linear modules, dropout; `first` is the lowest layer with an adapter."""

    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = ALL_LINEAR
    dropout: float = 0.0
    first: int = 0


PRESETS = {"default": Lora(), "attention": Lora(32, 64, ATTENTION)}


def parse_replay(text: str) -> Replay:
    """`FILE:0.25`, `FILE`, `0.25` or `0`. Raises UsageError."""
    name, colon, number = text.rpartition(":")
    if not colon:
        name, number = ("", text) if _is_number(text) else (text, str(REPLAY_SHARE))
    if not _is_number(number) or not 0 <= float(number) < 1:
        raise UsageError(f"--replay {text!r} has no share in [0, 1)", "write --replay general.jsonl:0.25")
    return Replay(Path(name) if name else None, float(number))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_rate(text: str) -> float | None:
    """A learning rate, or None for `auto`. Raises UsageError."""
    if text == "auto":
        return None
    if not _is_number(text):
        raise UsageError(f"--lr is {text!r}, neither a number nor auto", "write --lr 3e-4")
    return float(text)


def parse_targets(texts: Sequence[str]) -> tuple[str, ...]:
    """Module names of all texts, with commas between. Raises UsageError when there is none."""
    names = tuple(part.strip() for text in texts for part in text.split(",") if part.strip())
    if not names:
        raise UsageError(
            f"--lora-targets {','.join(texts)!r} names no module",
            "name its linear modules: --lora-targets q_proj,v_proj",
        )
    return names


def _optimisers() -> list[str]:
    return plugins.names("steer.training.optimisers", "steer.optimisers")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The hyperparameters of a training run."""

    steps: int | None = option(
        None, help="The number of optimiser steps.", low=1, default_text=f"{PASSES} passes over the samples, at most "
        f"{MOST_STEPS} steps", group="Training",
    )  # fmt: skip
    batch: int = option(8, help="The samples of a batch, over all processes.", low=1, group="Training")
    accumulate: int = option(
        1, help="The number of batches whose gradients are accumulated for one optimiser step.", low=1, group="Training"
    )
    lr: float | None = option(
        3e-4, help="The learning rate, or auto to try a few.", low=0, open_low=True, parse=parse_rate,
        default_text="3e-4", metavar="RATE|auto", group="Training",
    )  # fmt: skip
    optimiser: str = option("adamw", help="The optimiser: {names}.", names=_optimisers, group="Training")
    options: Mapping[str, Any] = option(
        {}, help="Set an option of the optimiser; --list-options lists them.", flag="--set", parse=read_assignments,
        metavar="NAME=VALUE", group="Training",
    )  # fmt: skip
    weight_decay: float = option(
        0.0, help="The decoupled weight decay, per unit of learning rate.", low=0, group="Training"
    )
    warmup: float = option(
        0.1, help="The share of the steps with a rising learning rate.", low=0, high=0.999, group="Training"
    )
    schedule: str = option(
        "cosine",
        help=f"The learning-rate schedule after the warm-up: {SCHEDULE_NAMES}.",
        choices=SCHEDULES,
        metavar="NAME",
        group="Training",
    )
    clip: float = 1.0  # the largest norm of the gradient; 0 does not clip
    evaluate_every: int = option(
        0, help="The number of steps between evaluations on held-out samples, and between checkpoints.", low=0,
        default_text="a sixth of all, at most 50", group="Training",
    )  # fmt: skip
    patience: int = option(
        5, help="Stop after this many evaluations without a lower held-out loss.", low=1, group="Training"
    )
    checkpointing: bool = option(
        False, help="Recompute activations in the backward pass, to save memory.", group="Training"
    )
    sharded: bool = option(
        False, help="Shard weights, gradients and optimiser state over the processes of torchrun.", flag="--fsdp",
        group="Training",
    )  # fmt: skip
    report_to: str = option("none", help="Log the curves to tensorboard, wandb or trackio; or none.", group="Training")
    seed: int = option(0, help="The random seed.", group="Training")
    beta: float = 0.1  # of DPO: the greater, the closer the student stays to the base

    @property
    def total_steps(self) -> int:
        """The optimiser steps; the most that are taken by default where `for_samples` has not decided."""
        return self.steps or MOST_STEPS

    def for_samples(self, count: int) -> TrainingSettings:
        """The settings with the default number of steps for `count` training samples, where none was given.

        More passes over few samples only overfit: 24 examples raised the held-out loss within 200 steps.
        """
        if self.steps is not None:
            return self
        default_steps = -(-PASSES * count // (self.batch * self.accumulate))
        return dataclasses.replace(self, steps=max(LEAST_STEPS, min(MOST_STEPS, default_steps)))

    def identity(self) -> dict[str, Any]:
        """The settings that determine the result, under the names of the first run records, which stay readable."""
        names = (
            "steps", "batch", "accumulate", "optimiser", "options", "lr", "weight_decay", "warmup", "schedule", "clip",
            "evaluate", "patience", "checkpointing", "seed", "report_to", "beta",
        )  # fmt: skip
        values = {name: getattr(self, "evaluate_every" if name == "evaluate" else name) for name in names}
        return {**values, **({"sharded": True} if self.sharded else {})}


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """The LoRA adapter that is trained, or all weights."""

    preset: str = option(
        "default", help="The LoRA preset: all linear modules with rank 16, or those of attention with rank 32.",
        choices=tuple(PRESETS), group="Adapter",
    )  # fmt: skip
    lora_rank: int | None = option(
        None, help="The rank of the adapter.", low=1, default_text="16; attention: 32", group="Adapter"
    )
    lora_alpha: int | None = option(
        None, help="The alpha of the adapter, whose update is scaled by alpha / rank.", low=1,
        default_text="32; attention: 64", group="Adapter",
    )  # fmt: skip
    lora_targets: tuple[str, ...] | None = option(
        None, help="The linear modules that get an adapter, such as q_proj,v_proj.", parse=parse_targets,
        default_text="those of the preset", metavar="NAME,...", group="Adapter",
    )  # fmt: skip
    full: bool = option(False, help="Train all weights instead of an adapter.", group="Adapter")

    def lora(self, first_layer: int = 0) -> Lora | None:
        """The adapter, from `first_layer` up; None where all weights are trained."""
        if self.full:
            return None
        given = {"rank": self.lora_rank, "alpha": self.lora_alpha, "targets": self.lora_targets}
        changes = {name: value for name, value in given.items() if value is not None}
        return PRESETS[self.preset]._replace(**changes, first=first_layer)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class BakeRequest:
    """The options of every mode."""

    model: str = option(
        "smollm2", help="A model folder, a hub id (org/name@revision), or the bundled smollm2.", complete="models"
    )
    out: Path = option(help="The folder to write; with --as vector, the .safetensors file.", flag=("-o", "--out"))
    force: bool = option(False, help="Replace the output file if it exists; folders are never replaced.")
    as_: str = option(
        "model", help="Write a model folder, a LoRA adapter, or a task vector.", choices=("model", "lora", "vector")
    )
    vectors: Mapping[str, Path] = option(
        {},
        help="The vector file for a name in the expression; may be given several times.",
        flag="--vector",
        metavar="NAME=FILE",
    )
    any_base: bool = option(False, help="Allow vectors of other models of the same size.")
    device: str = option("auto", help="The device to compute on: auto, cpu, cuda, cuda:N or mps.")
    threads: int | None = option(
        None, help="The number of threads that write the output.", low=1, default_text="one for each core"
    )


FILE_SUFFIXES = (".safetensors", ".gguf", ".pt", ".bin", ".json")


def require_output_name(request: BakeRequest) -> None:
    """Refuse the name of a file for what is written as a folder. Raises UsageError."""
    if request.as_ != "vector" and request.out.suffix.lower() in FILE_SUFFIXES:
        raise UsageError(
            f"--as {request.as_} writes a folder, and {request.out} is the name of a file",
            f"write a task vector: --as vector; or name a folder: -o {request.out.with_suffix('')}",
        )


@dataclass(frozen=True, kw_only=True)
class CompositionRequest(BakeRequest):
    """The options of modes that bake a composition of vectors."""

    composition: str | None = option(None, help="The composition of vectors to bake, such as 1.5*warm.", argument=True)
    prompts: Path | None = option(
        None, help="Prompts, one per line: to distil on, or to prove a fold on.", group="Composition"
    )
    allow_strength: bool = option(
        False, help="Allow strengths beyond twenty times the recommended one.", group="Composition"
    )


@dataclass(frozen=True, kw_only=True)
class TrainingRequest(BakeRequest):
    """The options of every mode that trains."""

    settings: TrainingSettings = field(default_factory=TrainingSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    replay: Replay = option(
        Replay(), help="Replay data that keep the base's behaviour: FILE:SHARE, or a share of the model's own texts.",
        old=("--mix",), parse=parse_replay, default_text="0.25", metavar="FILE:SHARE", group="Data",
    )  # fmt: skip
    compare_replay: bool = option(
        False, help="Train once more without replay data, and report its retention.", old=("--compare-mix",),
        group="Evaluation",
    )  # fmt: skip
    pos: Path | None = option(
        None, help="Held-out examples that show the trait, for the report: none of the training or replay data.",
        group="Evaluation",
    )  # fmt: skip
    neg: Path | None = option(None, help="Held-out examples that show its opposite.", group="Evaluation")
    context: str = option(
        "full", help="full trains through the prompts; frozen computes prompts once and trains on completions alone.",
        choices=("full", "frozen"), group="Training",
    )  # fmt: skip
    dtype: str = option("auto", help="The dtype to train and evaluate in: auto, float32, bfloat16 or float16.")

    @property
    def sampling(self) -> dict[str, Any]:
        """How completions are sampled, as run records name it."""
        return {"tokens": REPLAY_TOKENS, "temperature": 1.0}
