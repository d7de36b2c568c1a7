"""Extraction side by side with steering-vectors, repeng and a bare forward pass, interleaved in one run.

    .venv/bin/python tests/bench/extraction.py --peers PEERS/bin/python [--rounds 5] [--pairs 128] [--dtype float32]
    .venv/bin/python tests/bench/extraction.py --memory        peak memory from 256 to 4,096 examples

The peers need an environment of their own: see `peers.py`. Each round runs every contestant once, in turn, so a drift
of the machine meets them all; where others share the machine, `--processor --threads 1` counts the seconds that each
had a processor. An example is one text. Ours is the whole call of `steer.extract`: reading, tokenising, activations
at every layer, the held-out judgement with its negative controls, without the calibration. The bare pass computes as
many tokens as ours must (each distinct token of the prefix tree once), in dense unpadded batches as wide as the
examples are long, of the size that is fastest, without head and cache; "activations" is our pass alone, without
tokenising and judgement.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from figures import machine, spread

DATA = Path(__file__).parents[2] / "examples" / "data"
PASSES = (256, 512, 1024)  # tokens of a bare pass; the fastest counts
ASK = "How was your day?"  # the prompt that all examples share with --prompt one


def examples(pairs: int, prompt: str = "own") -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """That many pairs of the project's own data: each with its own prompt, or the first sentences after one prompt."""
    names = (("warm", "cold"), ("formal", "casual"))
    rows = [
        [json.loads(line) for name in side for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
        for side in zip(*names, strict=True)
    ]
    if prompt == "one":
        for row in itertools.chain(*rows):
            row["prompt"], row["completion"] = ASK, re.split(r"(?<=[.!?]) ", row["completion"])[0]
    return rows[0][:pairs], rows[1][:pairs]


def rendered(loaded: Any, rows: list[dict[str, str]]) -> list[str]:
    """Each example as the text that a peer is given."""
    return [
        loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}],
            tokenize=False,
        )
        for row in rows
    ]


def timed(work: Callable[[], object], processor: bool = False) -> float:
    """Seconds of a whole call: those of the clock, or those that this process had a processor."""
    clock = time.process_time if processor else time.perf_counter
    started = clock()
    work()
    return clock() - started


def bare(stack: Any, vocabulary: int, tokens: int, length: int, processor: bool = False) -> float:
    """Seconds of a forward pass over that many tokens through the decoder alone, in rows of `length`.

    The best of several batch sizes, for ours should be measured against the fastest that a pass can be.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    found = []
    for size in PASSES:
        ids = torch.randint(5, vocabulary, (max(1, size // length), length), generator=generator)
        times = -(-tokens // ids.numel())

        def repeated(ids: Any = ids, times: int = times) -> None:
            for _ in range(times):
                stack(input_ids=ids, use_cache=False)

        with torch.inference_mode():
            found.append(timed(repeated, processor) * tokens / (times * ids.numel()))
    return min(found)


def compare(arguments: argparse.Namespace) -> None:
    """Run the rounds and print examples per second and ratios, pair by pair."""
    import torch

    import steer
    from probes.capture.activations import activations
    from probes.data.reading import read
    from probes.models.residual import blocks, decoder, text_config
    from probes.models.tokens import tokenise

    torch.set_num_threads(arguments.threads)
    loaded = steer.load_model("smollm2", dtype=arguments.dtype)
    pos, neg = examples(arguments.pairs, arguments.prompt)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", delete=False) as file:
        for a, b in zip(rendered(loaded, pos), rendered(loaded, neg), strict=True):
            file.write(json.dumps({"positive": a, "negative": b}) + "\n")
    peers = subprocess.Popen(
        [
            arguments.peers, str(Path(__file__).parent / "peers.py"), str(loaded.source.path), file.name,
            "--dtype", arguments.dtype, "--threads", str(arguments.threads),
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert peers.stdin is not None
    assert peers.stdout is not None

    def peer(name: str) -> float:
        assert peers.stdin is not None
        assert peers.stdout is not None
        peers.stdin.write(name + "\n")
        peers.stdin.flush()
        return float(json.loads(peers.stdout.readline())["processor_seconds" if arguments.processor else "seconds"])

    def ours() -> float:
        return timed(lambda: steer.extract(pos, neg, model=loaded, budget_kl=0), arguments.processor)

    tokens = steer.extract(pos, neg, model=loaded, budget_kl=0).tokens["computed"]  # also the warm-up
    texts = [*rendered(loaded, pos), *rendered(loaded, neg)]
    length = round(sum(len(ids) for ids in loaded.tokenizer(texts)["input_ids"]) / len(texts))
    contrast = read(pos, neg)
    tokenised = tokenise([*contrast.positive, *contrast.negative], loaded.tokenizer)

    def activations_alone() -> float:
        layers = range(len(blocks(loaded.model)))
        return timed(lambda: activations(loaded.model, tokenised, layers).spill.close(), arguments.processor)

    stack, vocabulary = decoder(loaded.model), text_config(loaded.model).vocab_size
    contestants = {
        "steer": ours,
        "activations": activations_alone,
        "bare forward": lambda: bare(stack, vocabulary, tokens, length, arguments.processor),
        "steering-vectors": lambda: peer("steering-vectors"),
        "repeng": lambda: peer("repeng"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-1, arguments.rounds):
        for name, run in contestants.items():
            took = run()
            if number >= 0:  # the first round warms up
                seconds[name].append(took)
    peers.stdin.write("quit\n")
    peers.stdin.flush()
    peers.wait()
    os.unlink(file.name)

    count = len(pos) + len(neg)
    print(
        f"{machine()}, {arguments.threads} threads, {arguments.dtype}, {count} examples of {length} tokens on average"
    )
    print(f"prompt: {arguments.prompt}; {tokens} tokens to compute, each distinct one once")
    what = "processor seconds, on a machine that others share" if arguments.processor else "seconds"
    print(f"{arguments.rounds} rounds, interleaved, in {what}; median (least to greatest)")
    for name, took in seconds.items():
        print(f"{name:17} {spread([count / t for t in took])} examples/s")
    for name in ("steering-vectors", "repeng", "bare forward"):
        ratios = [theirs / mine for theirs, mine in zip(seconds[name], seconds["steer"], strict=True)]
        print(f"steer / {name:17} {spread(ratios)}")
    ratios = [theirs / mine for theirs, mine in zip(seconds["bare forward"], seconds["activations"], strict=True)]
    print(f"activations / bare      {spread(ratios)}")


def memory() -> None:
    """Peak resident memory of whole processes, for more and more examples."""
    print(machine())
    for pairs in (128, 512, 2048):
        command = [sys.executable, __file__, "--memory-of", str(pairs)]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


def memory_of(pairs: int) -> None:
    """Extract from that many generated pairs and print the peak of this process."""
    import steer

    words = sorted({w for row in itertools.chain(*examples(140)) for w in row["completion"].split()})
    draw = random.Random(0)
    pos, neg = ([{"text": " ".join(draw.choices(words[side::2], k=8))} for _ in range(pairs)] for side in (0, 1))
    found = steer.extract(pos, neg, budget_kl=0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{2 * pairs:5} examples  peak {peak:.0f} MiB  {2 * pairs / found.seconds:.1f} examples/s")


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", help="the Python of the peers' environment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--prompt", choices=["own", "one"], default="own", help="a pair's own prompt, or one for all")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--processor", action="store_true", help="count processor seconds; sensible with --threads 1")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        memory_of(arguments.memory_of)
    elif arguments.memory:
        memory()
    elif arguments.peers:
        compare(arguments)
    else:
        parser.error("give --peers PYTHON, or --memory")


if __name__ == "__main__":
    main()
