"""A step of distillation beside TRL 1.16's DistillationTrainer, on the same batch, interleaved in one run.

    python3.11 -m venv peer && peer/bin/pip install -e '.[train]' 'trl==1.16.0' datasets
    peer/bin/python tests/bench/distillation.py [--rounds 10] [--threads 2] [--cpu]
    peer/bin/python tests/bench/distillation.py --memory

A step is the forward pass, the loss (forward KL to the teacher on the completions' tokens), the backward pass, the
clipping, and AdamW's step, on the bundled model in float32 with a LoRA of rank 16 on all linear layers. The batch is of
random tokens, the same for both. TRL's trainer asks a second copy of the model in every step; `bake` asks the one model
under the composition once, before training, and keeps its likeliest tokens: `with the teacher` counts that in every
step, as if each sample were seen once only. TRL samples completions in every step too; that is left out, so each is
given the batch as it would have sampled it. Its teacher has the student's own weights, so its loss is 0 at first. Each
round runs all contestants once, in an order drawn anew; the first round is thrown away. A ratio is of one round's two
times. `--memory` runs each contestant alone, in a process of its own, and prints the peak of its resident memory.
`--cpu` counts the processor seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from figures import machine, spread

import steer
from probes.interventions import steering
from probes.models.completions import Completion
from steer.training import loop, student
from steer.training.data import samples
from steer.training.objectives import divergence
from steer.training.requests import Lora, TrainingSettings
from vectors import references
from vectors.steering import SteeringVector

MODEL = "smollm2"
OURS, WITH_TEACHER, TRL = "steer", "steer, with the teacher", "TRL"
LORA = Lora()


def rows(arguments: argparse.Namespace) -> list[Completion]:
    """The batch: prompts and completions of random tokens."""
    chosen = random.Random(0)

    def ids(count: int) -> list[int]:
        return [chosen.randrange(100, 49_000) for _ in range(count)]

    return [Completion(ids(arguments.prompt), ids(arguments.completion)) for _ in range(arguments.batch)]


def fresh() -> Any:
    """The bundled model in float32."""
    return steer.load_model(MODEL, dtype="float32").model


def finish(trainer: Any, model: Any) -> None:
    """What follows the backward pass in a step."""
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    trainer.optimizer.step()
    model.zero_grad()


def ours(given: list[Completion], folder: Path, ask: bool) -> Callable[[], float]:
    """A step of `steer bake --mode distil`."""
    base = fresh()
    generator = torch.Generator().manual_seed(0)
    vector = SteeringVector({14: torch.randn(576, generator=generator)})

    def asked() -> list[samples.Sample]:
        return samples.soft_targets(base, given, given, steering(base, "2*v", {"v": vector}, any_base=True))

    made = asked()
    # The teacher is the same model without its adapter, so it is asked before there is one.
    model = student.adapted(base, LORA, 0) if not ask else None
    settings = TrainingSettings(batch=len(given))
    arguments = loop.TrainingArguments(output_dir=str(folder), report_to="none", learning_rate=1e-4)
    target = model if model is not None else student.adapted(fresh(), LORA, 0)
    trainer = loop.BakeTrainer(
        divergence,
        settings,
        loop.whole_pass,
        0,
        model=target,
        args=arguments,
        train_dataset=loop._Samples(made),
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    target.train()

    def step() -> float:
        batch = divergence.collate(asked() if ask else made, 0)
        loss = trainer.training_step(target, batch)
        finish(trainer, target)
        return float(loss)

    return step


def theirs(given: list[Completion], folder: Path) -> Callable[[], float]:
    """A step of TRL's trainer, without its sampling."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DistillationConfig, DistillationTrainer

    tokenizer = AutoTokenizer.from_pretrained(references.resolve(MODEL).path, local_files_only=True)
    arguments = DistillationConfig(
        output_dir=str(folder), report_to="none", learning_rate=1e-4, beta=0.0, bf16=False,
        gradient_checkpointing=False, per_device_train_batch_size=len(given), use_cpu=True,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=fresh(), teacher_model=fresh(), args=arguments, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "x"}] * len(given)),
        peft_config=LoraConfig(
            r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )  # fmt: skip
    trainer.create_optimizer()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    prompt = given[0].prompt_length
    ids = torch.tensor([row.ids for row in given])
    inputs = {
        "prompt_ids": ids[:, :prompt], "prompt_mask": torch.ones_like(ids[:, :prompt]),
        "completion_ids": ids[:, prompt:], "completion_mask": torch.ones_like(ids[:, prompt:]),
        "num_items_in_batch": torch.tensor(ids[:, prompt:].numel()),
    }  # fmt: skip
    trainer._prepare_inputs = lambda batch: batch  # without its sampling

    def step() -> float:
        loss = trainer.training_step(trainer.model, inputs, None)
        finish(trainer, trainer.model)
        return float(loss)

    return step


def make(name: str, given: list[Completion], folder: Path) -> Callable[[], float]:
    """A contestant's step."""
    return theirs(given, folder) if name == TRL else ours(given, folder, name == WITH_TEACHER)


def memory(arguments: argparse.Namespace) -> None:
    """Each alone, in a process of its own."""
    found = {}
    for name in (OURS, TRL):
        command = [sys.executable, __file__, "--alone", name]
        for key in ("batch", "prompt", "completion", "threads"):
            command += [f"--{key}", str(getattr(arguments, key))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:24} {found[name]['peak']:.0f} MiB, of which {found[name]['idle']:.0f} before the first step")
    print(f"ratio {found[OURS]['peak'] / found[TRL]['peak']:.2f}")


def resident() -> float:
    """The peak of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Step, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--completion", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.cpu else arguments.threads)
    clock = time.process_time if arguments.cpu else time.perf_counter
    given = rows(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.memory:
            return memory(arguments)
        if arguments.alone:
            step, idle = make(arguments.alone, given, folder), resident()
            for _ in range(3):
                step()
            return print(json.dumps({"idle": idle, "peak": resident()}))
        steps = {name: make(name, given, folder / name) for name in (OURS, WITH_TEACHER, TRL)}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        losses = {}
        for number in range(arguments.rounds + 1):
            for name in random.Random(number).sample(list(steps), len(steps)):
                started = clock()
                losses[name] = steps[name]()
                if number:
                    seconds[name].append(clock() - started)
    print(f"{machine()}; {torch.get_num_threads()} threads; {len(given)} x {arguments.prompt} + {arguments.completion}")
    for name, times in seconds.items():
        if not math.isfinite(losses[name]):
            raise SystemExit(f"the loss of {name} is {losses[name]}")
        print(f"{name:24} {spread(times)} s, loss {losses[name]:.4g}")
    for name in (OURS, WITH_TEACHER):
        print(f"TRL / {name:24}", spread([b / a for a, b in zip(seconds[name], seconds[TRL], strict=True)]))


if __name__ == "__main__":
    main()
