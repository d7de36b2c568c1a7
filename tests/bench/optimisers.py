"""One step of each optimiser on the linear layers of smollm2, beside torch's fused AdamW, interleaved in one run.

    .venv/bin/python tests/bench/optimisers.py [--rounds 15] [--rank 64] [--threads 2] [--cpu]

The weights have the shapes of the bundled model's linear layers; weights and gradients are random, in float32. Each
round steps every contestant once, in turn, so a drift of the machine meets them all; the first two rounds are thrown
away. A round's ratio is of that round's two times. State is what `state_dict` holds. `--cpu` counts the processor
seconds of one thread instead of the time on the wall, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from figures import machine, spread
from torch import nn

from steer.training import optimisers
from vectors import references

REFERENCE = "torch AdamW, fused"


def shapes(reference: str) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model's linear layers, without the head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(references.resolve(reference).path, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [
        (f"{name}.weight", tuple(module.weight.shape))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def contestants(parameters: list[tuple[str, nn.Parameter]], rank: int) -> dict[str, torch.optim.Optimizer]:
    """All optimisers, on the same weights."""
    own: dict[str, tuple[str, dict[str, Any]]] = {
        "adamw": ("adamw", {}),
        "apollo": ("apollo", {"rank": rank}),
        "apollo, gaussian": ("apollo", {"rank": rank, "projection": "gaussian"}),
        "apollo_mini": ("apollo_mini", {}),
    }
    found: dict[str, torch.optim.Optimizer] = {
        REFERENCE: torch.optim.AdamW([p for _, p in parameters], lr=1e-5, weight_decay=0.0, fused=True)
    }
    for label, (name, options) in own.items():
        found[label] = optimisers.create(name, parameters, lr=1e-5, **options)
    return found


def state_bytes(optimiser: torch.optim.Optimizer) -> int:
    """Bytes of the tensors that a checkpoint of the optimiser holds."""
    states = optimiser.state_dict()["state"].values()
    return sum(v.numel() * v.element_size() for state in states for v in state.values() if isinstance(v, torch.Tensor))


def main() -> None:
    """Step, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.cpu else arguments.threads)
    clock = time.process_time if arguments.cpu else time.perf_counter

    parameters = [(name, nn.Parameter(0.02 * torch.randn(shape))) for name, shape in shapes(arguments.model)]
    for _, parameter in parameters:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    running = contestants(parameters, arguments.rank)
    seconds: dict[str, list[float]] = {label: [] for label in running}
    for number in range(arguments.rounds + 2):
        for label, optimiser in running.items():
            started = clock()
            optimiser.step()
            if number > 1:
                seconds[label].append(clock() - started)

    count = sum(parameter.numel() for _, parameter in parameters)
    print(f"{machine()}; {torch.get_num_threads()} threads; {len(parameters)} matrices, {count / 1e6:.1f} M weights")
    whole = state_bytes(running[REFERENCE])
    for label, optimiser in running.items():
        times = seconds[label]
        ratios = [a / b for a, b in zip(times, seconds[REFERENCE], strict=True)]
        size = state_bytes(optimiser)
        print(
            f"{label:20} {spread([1e3 * t for t in times], '.0f')} ms   / {REFERENCE} {spread(ratios)}"
            f"   state {size / 1e6:.1f} MB, {size / whole:.4f}"
        )


if __name__ == "__main__":
    main()
