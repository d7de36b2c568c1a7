"""Steering in vLLM on a GPU beside stock vLLM, on a model of 8 B parameters with random weights, in one run.

    python tests/bench/serving_gpu.py [--gates] [--rounds 8] [--runner v2] [--json FILE]

Two processes hold an engine each on the one GPU: stock vLLM, and vLLM with the plugin, 256 slots and 4 directions; both
as vLLM starts by default (compiled, CUDA graphs, the engine core in a process of its own), without the prefix cache. A
round runs every contestant once, in an order drawn anew, one at a time; the round before the first does not count. All
requests of a round arrive at once, with random tokens, new in every round and equal within it. A ratio is taken
within its round; what is printed is the geometric mean of the ratios with a 95 % interval (bootstrap over rounds). Of
throughput the ratio is that of speeds, of times (to the first token, between tokens; the median over requests) that of
stock's time to the contestant's: below 1 is slower everywhere.

With `--gates` the engine with the plugin has gates at layer 12 in its graphs: "nothing steered" measures them unused,
and further contestants have a condition in every request, decided once (@when) or by every token (@while).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # in this order: tests/ has a folder named steer too

from engine_process import Engines, random_probes, random_vectors, write_settings  # noqa: E402
from serving import READ, four, gated, interval, three  # noqa: E402

SHAPE = {  # of Llama 3.1 8B
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
}
FIGURES = ("throughput", "first token", "between tokens")


def save_shape(folder: Path) -> Path:
    """A model folder without weights: vLLM draws them."""
    from transformers import LlamaConfig

    LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(folder)
    return folder


def figures_of(engine: Engines, ids: Sequence[Sequence[int]], tokens: int, steer: Sequence[str] | None) -> list[float]:
    """The figures of one batch: tokens of response a second, seconds to the first token and between tokens."""
    expressions: Sequence[str | None] = steer or [None] * len(ids)
    jobs = [
        {"ids": one, "tokens": tokens, "unscored": True, "streamed": True, "steer": expression}
        for one, expression in zip(ids, expressions, strict=True)
    ]
    found = engine.call("traffic", jobs=jobs)
    assert found["tokens"] == tokens * len(ids)
    return [found["tokens"] / found["seconds"], median(found["first"]), median(found["between"])]


def main() -> None:
    """Start both engines, run the rounds, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--runner", choices=("v1", "v2"), default="v2")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--gates", action="store_true", help="with gates in the graphs, and requests that use them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = random.Random(arguments.seed)
    SHAPE["num_hidden_layers"] = arguments.layers
    import torch
    import vllm

    print(
        f"{torch.cuda.get_device_name()}; vLLM {vllm.__version__}, torch {torch.__version__}, {arguments.runner}; "
        f"Llama of {arguments.layers} layers, bfloat16, random weights",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_shape(folder / "model")
        vectors = random_vectors(folder, SHAPE["hidden_size"], arguments.layers, 1.0, everywhere=True)
        read = min(READ, arguments.layers // 2)
        probes = random_probes(folder, SHAPE["hidden_size"], {"anger": read}) if arguments.gates else {}
        settings = write_settings(folder, {**vectors, **probes})
        stock, plugin = (
            Engines(
                is_steered,
                folder / f"{'steer' if is_steered else 'stock'}.txt",
                VLLM_CACHE_ROOT=str(folder / "cache"),
                VLLM_ENABLE_V1_MULTIPROCESSING="1",
                VLLM_USE_V2_MODEL_RUNNER=str(int(arguments.runner == "v2")),
                OMP_NUM_THREADS="4",
            )
            for is_steered in (False, True)
        )
        for engine in (stock, plugin):
            engine.start(
                model,
                settings if engine.plugin else None,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype="bfloat16",
                enforce_eager=False,
                attention_backend=None,
                block_size=None,
                gpu_memory_utilization=0.35,
                kv_cache_memory_bytes=14 * 2**30,
                max_model_len=2048,
                max_num_seqs=256,
                enable_prefix_caching=False,
            )
            print(f"{'vLLM with the plugin' if engine.plugin else 'stock vLLM'} has started", flush=True)
        parts = [
            (
                64,
                512,
                128,
                {
                    "stock again": None,
                    "nothing steered": None,
                    "1 composition of 3 vectors": lambda: [three()] * 64,
                    "32 compositions of 3 vectors": lambda: [three() for _ in range(32)] * 2,
                    "64 compositions of 4 projections": lambda: [four() for _ in range(64)],
                },
            ),
            (
                256,
                128,
                64,
                {
                    "stock again": None,
                    "nothing steered": None,
                    "256 compositions of 3 vectors": lambda: [three() for _ in range(256)],
                },
            ),
        ]
        if arguments.gates:
            above = f"{read + 1}-{arguments.layers - 1}"
            for count, _, _, contestants in parts:
                for kind in ("when", "while"):
                    # 64 compositions at most: with a gate, each takes two of the 256 slots.
                    contestants[f"a gate in every request, @{kind}"] = lambda times=count // 64, kind=kind: (
                        [gated(kind, above) for _ in range(64)] * times
                    )
        record = []
        for count, length, tokens, contestants in parts:
            measured: dict[str, list[list[float]]] = {"stock": [], **{contestant: [] for contestant in contestants}}
            for number in range(-1, arguments.rounds):
                ids = [[chosen.randrange(100, SHAPE["vocab_size"]) for _ in range(length)] for _ in range(count)]
                for contestant in chosen.sample(list(measured), len(measured)):
                    make: Any = contestants.get(contestant)
                    engine = stock if contestant.startswith("stock") else plugin
                    found = figures_of(engine, ids, tokens, make() if make else None)
                    if number >= 0:
                        measured[contestant].append(found)
            print(f"\n{count} requests, {length} tokens of prompt, {tokens} of response; {arguments.rounds} rounds")
            for contestant, rows in measured.items():
                rate, first, between = (median(column) for column in zip(*rows, strict=True))
                print(
                    f"  {contestant:34} {rate:8.0f} tokens/s, first token {first * 1e3:7.1f} ms, "
                    f"between tokens {between * 1e3:6.2f} ms"
                )
                if contestant == "stock":
                    continue
                told = []
                for i, figure in enumerate(FIGURES):
                    pairs = zip(rows, measured["stock"], strict=True)
                    ratios = [a[i] / b[i] if i == 0 else b[i] / a[i] for a, b in pairs]
                    mean, low, high = interval(ratios)
                    told.append(f"{figure} {mean:.3f} ({low:.3f} to {high:.3f})")
                print(f"  {'':34} / stock: {', '.join(told)}", flush=True)
            record.append({"requests": count, "prompt": length, "response": tokens, "figures": measured})
        if arguments.json:
            arguments.json.write_text(json.dumps(record))
        for engine in (stock, plugin):
            engine.close()


if __name__ == "__main__":
    main()
