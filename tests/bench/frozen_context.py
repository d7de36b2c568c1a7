"""A training step behind a frozen context, beside the whole pass, interleaved in one run, on the bundled model.

    .venv/bin/python tests/bench/frozen_context.py [--context 2048] [--decision 64] [--rounds 3] [--threads 2] [--cpu]

A step is the forward pass, the loss on the decision's tokens, and the backward pass to all weights, in float32, batch
1; the optimiser's step, which is the same for both, is left out. Both compute logits for the decision alone. The whole
pass has gradients through the context. `freeze` is what the context costs once, before it is used again and again.
Before anything is timed both run once, and their losses are compared: they are the same number. `--cpu` counts the
processor seconds of one thread, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from figures import machine, spread

import steer
from steer.training import frozen_context


def main() -> None:
    """Step, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--decision", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.cpu else arguments.threads)
    clock = time.process_time if arguments.cpu else time.perf_counter
    model: Any = steer.load_model(arguments.model, dtype="float32").model.train().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    size, kept = arguments.context + arguments.decision, arguments.decision
    ids = torch.randint(5, model.config.vocab_size, (1, size), generator=generator)
    context, decision = ids[:, : arguments.context], ids[:, arguments.context :]

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[0, :-1], decision[0, 1:])

    def whole() -> float:
        model.zero_grad()
        value = loss(model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits)
        value.backward()
        return value.item()

    held = frozen_context.freeze(model, context)

    def behind() -> float:
        model.zero_grad()
        value = loss(frozen_context.continued(model, held, decision))
        value.backward()
        return value.item()

    contestants: dict[str, Callable[[], Any]] = {
        "whole pass": whole,
        "frozen context": behind,
        "freeze": lambda: frozen_context.freeze(model, context),
    }
    difference = abs(whole() - behind())
    if difference > 1e-3:
        raise SystemExit(f"the losses differ by {difference}")
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(arguments.rounds):
        for name, run in contestants.items():
            started = clock()
            run()
            seconds[name].append(clock() - started)

    print(f"{machine()}; {torch.get_num_threads()} threads; {arguments.context} + {arguments.decision} tokens")
    print(f"losses differ by {difference:.1e}")
    for name, times in seconds.items():
        print(f"{name:16} {spread(times)} s")
    columns = list(zip(*seconds.values(), strict=True))
    print("whole / frozen", spread([a / b for a, b, _ in columns]))
    for uses in (1, 4, 16):
        print(f"whole / (freeze / {uses} + frozen)", spread([a / (c / uses + b) for a, b, c in columns]))


if __name__ == "__main__":
    main()
