"""A sweep over layers and strengths beside the naive loop, on the same items, paired and interleaved.

    .venv/bin/python tests/bench/sweep.py [--items 64] [--layers 30] [--rounds 3] [--persona FILE] [--naive-only]

All give the log-likelihood of every token of every completion at every layer and strength. The naive loop takes one
composition and one text at a time: hooks on the model, its logits at every token. The batched loop takes one
composition at a time too, but eight texts of like length a pass, and logits of completion tokens only. Ours computes
what compositions share once (`probes.arms`). A round measures each layer once by all, in turn, so that a drift of the
machine meets them alike; the order changes from layer to layer. `--layers N` takes N evenly spaced layers, whose mean
is that of all: a few stand for the loops' full sweep, while ours pays a greater part for the pass below them. One of
the seven strengths is 0, which the loops compute at every layer. `--naive-only` leaves out the batched loop. Seconds
are those that the process had a processor, with one thread.

The limit is the multiplications that every composition needs, whatever is shared: its blocks above the steered layer
for each distinct token, and the head for each distinct position, at the rate at which this machine multiplies matrices
of these sizes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from figures import machine, spread

from probes.arms.scores import Completions
from probes.interventions import no_intervention, steering
from probes.logits import completion_logits, log_likelihoods, logits_of
from probes.models import loading, residual
from probes.models.completions import completions_of

DATA = Path(__file__).parents[2] / "examples" / "data"
STRENGTHS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


def items_of(arguments: argparse.Namespace, loaded: Any) -> list[Any]:
    """Pairs of completions: the project's warm and cold answers, or a persona's statements with yes and no."""
    from probes.data.examples import Example

    if arguments.persona:
        rows = [json.loads(line) for line in Path(arguments.persona).read_text().splitlines()][: arguments.items]
        examples = [Example(answer, row["question"]) for row in rows for answer in (" Yes", " No")]
    else:
        from probes.data.reading import read

        contrast = read(DATA / "warm.jsonl", DATA / "cold.jsonl")
        pairs = zip(contrast.positive, contrast.negative, strict=True)
        examples = [side for pair in list(pairs)[: arguments.items] for side in pair]
    return completions_of(examples, loaded.tokenizer, None)


def rate(model: Any) -> float:
    """Multiplications with addition per second: matrices of a block's greatest size, on a pass of our size."""
    size = residual.text_config(model).intermediate_size
    a, b = torch.randn(1024, residual.hidden_size(model)), torch.randn(size, residual.hidden_size(model))
    best = 0.0
    for _ in range(5):
        started = time.process_time()
        for _ in range(20):
            torch.nn.functional.linear(a, b)
        best = max(best, 20 * a.shape[0] * b.numel() / (time.process_time() - started))
    return best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--persona", help="a file of persona statements instead of the project's own examples")
    parser.add_argument("--naive-only", action="store_true", help="compare with the naive loop alone")
    arguments = parser.parse_args()
    references = ("naive",) if arguments.naive_only else ("naive", "batched")
    torch.set_num_threads(1)
    loaded = loading.load("smollm2", "cpu", "float32")
    model, completions = loaded.model, items_of(arguments, loaded)
    count = len(residual.blocks(model))
    layers = [int((i + 0.5) * count / arguments.layers) for i in range(arguments.layers)]
    generator = torch.Generator().manual_seed(0)
    directions = {layer: torch.randn(residual.hidden_size(model), generator=generator) / 10 for layer in layers}

    def steered_by(layer: int, strength: float) -> Any:
        return steering(model, {layer: strength * directions[layer]}) if strength else no_intervention

    def naive(layer: int) -> list[list[list[float]]]:
        return [
            [
                log_likelihoods(logits_of(model, each, steered)[each.prompt_length - 1 : -1], each.completion_ids)
                for each in completions
            ]
            for steered in (steered_by(layer, strength) for strength in STRENGTHS)
        ]

    def batched(layer: int) -> list[list[list[float]]]:
        results = []
        for strength in STRENGTHS:
            steered = steered_by(layer, strength)
            logs = {
                i: log_likelihoods(logits, completions[i].completion_ids)
                for i, logits in completion_logits(model, completions, steered)
            }
            results.append([logs[i] for i in range(len(completions))])
        return results

    seconds: dict[str, list[float]] = {name: [] for name in (*references, "steer")}
    greatest = 0.0
    tokens = positions = 0
    for number in range(arguments.rounds):
        scored = Completions(model, completions)
        took = dict.fromkeys(seconds, 0.0)
        for turn, layer in enumerate(layers):

            def ours(layer: int, scored: Completions = scored) -> list[Any]:
                return scored.scores([{layer: s * directions[layer]} if s else None for s in STRENGTHS])

            results: dict[str, Any] = {}
            for name in [*seconds][:: 1 if (turn + number) % 2 else -1]:
                started = time.process_time()
                results[name] = {"naive": naive, "batched": batched, "steer": ours}[name](layer)
                took[name] += time.process_time() - started
            for reference in references:
                for theirs, mine in zip(results[reference], results["steer"], strict=True):
                    for a, b in zip(theirs, mine.log_likelihoods, strict=True):
                        greatest = max(greatest, float((torch.tensor(a).double() - b).abs().max()))
        tokens = sum(int((part.depths >= 0).sum()) for part in scored.parts or [])
        positions = sum(len(part.kept) for part in scored.parts or [])
        for name, value in took.items():
            seconds[name].append(value)
        print(f"round {number + 1}: " + ", ".join(f"{name} {value:.1f} s" for name, value in took.items()), flush=True)

    block = sum(p.numel() for p in residual.blocks(model)[0].parameters())
    head = residual.text_config(model).vocab_size * residual.hidden_size(model)
    steered = sum(1 for s in STRENGTHS if s)
    above = sum(count - 1 - layer for layer in layers)
    needed = steered * (above * block * tokens + len(layers) * head * positions)
    limit = needed / rate(model)
    print(f"{machine()}, 1 thread, float32, smollm2; {len(layers)} layers x {len(STRENGTHS)} strengths")
    print(f"{len(completions)} completions, {sum(each.length for each in completions)} tokens, {tokens} distinct")
    print(f"greatest difference of a token's log-likelihood: {greatest:.1e}")
    for name, values in seconds.items():
        print(f"{name:7} {spread(values)} s")
    for name in references:
        ratios = [a / b for a, b in zip(seconds[name], seconds["steer"], strict=True)]
        print(f"{name + ' / steer':15} {spread(ratios)}")
    print(f"limit {limit:.1f} s: steer takes {spread([value / limit for value in seconds['steer']])} times that")


if __name__ == "__main__":
    main()
