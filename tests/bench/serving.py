"""Steering in vLLM side by side with stock vLLM, which has no plugin, interleaved in one run.

    .venv/bin/python tests/bench/serving.py [--gates] [--rounds 10] [--only batch,distinct,first,…] [--json FILE]

Two processes hold an engine each on `smollm2`, compiled: stock vLLM, and vLLM with the plugin and 4 directions. A round
runs every contestant once, in an order drawn anew, so that a drift of the machine meets them all; only one process
computes at a time. A ratio is taken within its round; what is printed is the geometric mean of the ratios with a 95 %
interval (bootstrap over rounds). The clock is what counts, on a machine that does nothing else. With `--threads 1`
nobody waits for another thread, so processor time is work alone, and that of a run's fastest step is the least
disturbed on a busy machine. Prompts are random tokens, new in every round and equal within it; the prefix cache is off.
Engines run inside their process, so the plugin's share of the front end is measured too.

    batch      32 requests: nothing steered; each with its own composition of three vectors at all layers; each with 4
               projections at all layers
    distinct   256 requests at once: 256 different compositions of three vectors, and all with the same one
    first      the time to the first token of one request alone: not steered, steered, steered by a new composition
    admission  the processor time of a new composition before it runs, in the front end (admission) and in the worker,
               where the step waits for it: of three vectors, of four projections, and of the worst that are allowed, of
               8 phases with four clamps each and of 128 terms; all at all layers
    stall      16 requests, 16 tokens of prompt and 48 of response, beside one client that sends requests one after
               the other: none, plain ones, and the worst compositions that are allowed, each of them new

With `--gates` the engine with the plugin is started with gates at layer 12, "nothing steered" measures them unused,
and `batch` and `first` have requests with a gate each: three vectors at the layers from 16 on, under a condition
that half of the random tokens fulfil, decided once (@when) or by every token (@while).

`--lock FILE` holds the file's lock while something is timed, and only then.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # in this order: tests/ has a folder named steer too

from engine_process import Engines, random_probes, random_vectors, write_settings  # noqa: E402
from figures import machine  # noqa: E402

VOCABULARY, HIDDEN, LAYERS = 49_152, 576, 30  # of smollm2
DRAWS = 10_000

Job = dict[str, Any]
Seconds = tuple[float, float, float]  # by the clock, of the processor, of the processor in the fastest step
KINDS = ("clock", "processor", "fastest step")


def prompts(count: int, length: int, chosen: random.Random) -> list[list[int]]:
    """Random tokens."""
    return [[chosen.randrange(100, VOCABULARY) for _ in range(length)] for _ in range(count)]


NAMES = ("warm", "formal", "calm", "dry")
NUMBERS = itertools.count(1)  # so that a composition is never seen twice, unless it should be


def three() -> str:
    """A composition of three vectors at all layers that has not been seen yet."""
    n = next(NUMBERS)
    return f"{1 + n * 1e-4:.4f}*warm - 0.4*formal + 0.3*calm"


def four() -> str:
    """One with four directions."""
    n = next(NUMBERS)
    return f"ablate(warm, {n * 1e-4:.4f}) + ablate(formal, 0.5) + clamp(calm, 0.1) + clamp(dry, -0.2)"


READ, ABOVE = 12, "16-29"  # the layer that a gate reads, and those that its terms steer


def gated(kind: str, above: str = ABOVE) -> str:
    """The three vectors under one condition, at the layers `above` those that are read; `kind` is when or while."""
    n = next(NUMBERS)
    terms = f"{1 + n * 1e-4:.4f}*warm[{above}]", f"- 0.4*formal[{above}]", f"+ 0.3*calm[{above}]"
    return " ".join(f"{term}@{kind}:anger>0" for term in terms)


def phased() -> str:
    """The composition that takes the longest to write: 8 phases, each with 4 clamps at all layers."""
    n = next(NUMBERS)
    return " + ".join(
        f"clamp({name}, {n * 1e-4:.4f})@after:{2 * i + j // 2}" for i in range(4) for j, name in enumerate(NAMES)
    )


def termed() -> str:
    """One of 128 terms, which takes the longest to read."""
    n = next(NUMBERS)
    return " + ".join(f"{n * 1e-6:.6f}*{NAMES[i % 4]}" for i in range(128))


def jobs(ids: Sequence[Sequence[int]], tokens: int, steer: Sequence[str] | None) -> list[Job]:
    """One request for each prompt."""
    expressions = steer or [None] * len(ids)  # type: ignore[list-item]
    return [
        {"ids": list(one), "tokens": tokens, "unscored": True, "steer": expression}
        for one, expression in zip(ids, expressions, strict=True)
    ]


def interval(ratios: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The geometric mean of ratios, and the ends of its 95 % interval, by resampling them."""
    logs, chosen = [math.log(ratio) for ratio in ratios], random.Random(seed)
    means = sorted(sum(chosen.choices(logs, k=len(logs))) / len(logs) for _ in range(DRAWS))
    low, high = means[int(0.025 * DRAWS)], means[int(0.975 * DRAWS) - 1]
    return math.exp(sum(logs) / len(logs)), math.exp(low), math.exp(high)


def interleaved(
    contestants: Mapping[str, Callable[[list[list[int]]], Seconds]],
    rounds: int,
    make: Callable[[], list[list[int]]],
    chosen: random.Random,
) -> dict[str, list[Seconds]]:
    """Seconds of each contestant in each round; the round before the first warms up and does not count."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in contestants}
    for number in range(-1, rounds):
        ids = make()
        for name in chosen.sample(list(contestants), len(contestants)):
            took = contestants[name](ids)
            if number >= 0:
                seconds[name].append(took)
    return seconds


def report(title: str, seconds: Mapping[str, list[Seconds]], pairs: Sequence[tuple[str, str]], tokens: int) -> Any:
    """Print the contestants and the ratios of their speeds; return both."""
    print(f"\n{title}; {len(next(iter(seconds.values())))} rounds")
    found: dict[str, Any] = {"title": title, "seconds": {k: list(v) for k, v in seconds.items()}, "ratios": {}}
    for name, took in seconds.items():
        middle = median(clock for clock, _, _ in took)
        rate = f"{tokens / middle:8.1f} tokens/s" if tokens > 1 else f"{middle * 1e3:8.1f} ms"
        print(f"  {name:42} {rate}  (median)")
    for one, other in pairs:
        told = []
        for kind, name in enumerate(KINDS):
            ratios = [b[kind] / a[kind] for a, b in zip(seconds[one], seconds[other], strict=True)]
            mean, low, high = interval(ratios)
            found["ratios"][f"{one} / {other}, {name}"] = (mean, low, high)
            told.append(f"{name} {mean:.3f} ({low:.3f} to {high:.3f})")
        print(f"  {one} / {other}: {'   '.join(told)}", flush=True)
    return found


@contextlib.contextmanager
def locked(file: Path | None) -> Iterator[None]:
    """Hold a file's lock, so that others who heed it wait."""
    if file is None:
        yield
        return
    with file.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def start(
    folder: Path, cache: Path, threads: int, *, stock: bool, eager: bool, gates: bool = False
) -> tuple[Engines, Engines]:
    """Stock vLLM (started only if some part needs it) and vLLM with the plugin, ready."""
    from vectors import references

    model = references.resolve("smollm2").path
    vectors = random_vectors(folder, HIDDEN, LAYERS, everywhere=True)
    probes = random_probes(folder, HIDDEN, {"anger": READ}) if gates else {}
    settings = write_settings(folder, {**vectors, **probes})
    environment = {
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": "2",
    }
    given = {
        "enforce_eager": eager,
        "max_model_len": 1024,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 4096,
        "enable_prefix_caching": False,
        "num_gpu_blocks_override": None,
    }
    engines = []
    for plugin in (False, True):
        engine = Engines(plugin, folder / f"{'steer' if plugin else 'stock'}.txt", **environment)
        engines.append(engine)
        if not plugin and not stock:
            continue
        print(f"starting {'vLLM with steer' if plugin else 'stock vLLM'}", file=sys.stderr, flush=True)
        engine.start(model, settings if plugin else None, **given)
    return engines[0], engines[1]


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default="batch,distinct,first,admission,stall")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="start without compiling, in a minute")
    parser.add_argument("--gates", action="store_true", help="with gates in the graph, and requests that use them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, help="vLLM's compile cache, kept for the next run")
    parser.add_argument("--lock", type=Path, help="hold this file's lock while something is timed")
    parser.add_argument("--json", type=Path, help="append everything measured to this file, a line a part")
    arguments = parser.parse_args()
    chosen = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        parts_wanted = arguments.only.split(",")
        stock, plugin = start(
            Path(name),
            (arguments.cache or Path(name) / "cache").absolute(),
            arguments.threads,
            stock=bool({"batch", "first"} & set(parts_wanted)),
            eager=arguments.eager,
            gates=arguments.gates,
        )
        how = "eager" if arguments.eager else "compiled"
        print(
            f"{machine()}; smollm2, float32, {how}; threads: {arguments.threads}; 256 rows, 4 directions"
            + (f", 2 gates at layer {READ}" if arguments.gates else ""),
            flush=True,
        )

        def run(engine: Engines, ids: list[list[int]], tokens: int, steer: Sequence[str] | None = None) -> Seconds:
            found: dict[str, Any] = engine.call("measure", jobs=jobs(ids, tokens, steer))
            assert found["tokens"] == tokens * len(ids)
            return found["seconds"], found["processor"], min(found["steps"])

        parts: dict[str, Callable[[], Any]] = {
            "batch": lambda: batch(stock, plugin, run, arguments.rounds, chosen, gates=arguments.gates),
            "distinct": lambda: distinct(plugin, run, arguments.rounds, chosen),
            "first": lambda: first(stock, plugin, run, arguments.rounds, chosen, gates=arguments.gates),
            "admission": lambda: admission(plugin, chosen),
            "stall": lambda: stall(plugin, arguments.rounds, chosen),
        }
        for part in parts_wanted:
            with locked(arguments.lock):
                if arguments.lock:
                    print(f"{part}: the lock is held", file=sys.stderr, flush=True)
                found = parts[part]()
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(
                        json.dumps({"part": part, "threads": arguments.threads, "seed": arguments.seed, **found}) + "\n"
                    )
        for engine in (stock, plugin):
            engine.close()


def batch(stock: Engines, plugin: Engines, run: Any, rounds: int, chosen: random.Random, *, gates: bool = False) -> Any:
    """32 requests, 16 tokens each of prompt and 32 of response."""
    contestants: dict[str, Callable[[list[list[int]]], Seconds]] = {
        "stock": lambda ids: run(stock, ids, 32),
        "stock again": lambda ids: run(stock, ids, 32),
        "nothing steered": lambda ids: run(plugin, ids, 32),
        "32 compositions of 3 vectors": lambda ids: run(plugin, ids, 32, [three() for _ in ids]),
        "32 compositions of 4 projections": lambda ids: run(plugin, ids, 32, [four() for _ in ids]),
    }
    if gates:
        contestants["a gate in every request, @when"] = lambda ids: run(plugin, ids, 32, [gated("when") for _ in ids])
        contestants["a gate in every request, @while"] = lambda ids: run(plugin, ids, 32, [gated("while") for _ in ids])
    seconds = interleaved(contestants, rounds, lambda: prompts(32, 16, chosen), chosen)
    pairs = [(name, "stock") for name in contestants if name != "stock"]
    return report("batch of 32, 16 tokens of prompt, 32 of response", seconds, pairs, 32 * 32)


def distinct(plugin: Engines, run: Any, rounds: int, chosen: random.Random) -> Any:
    """256 requests at once, 8 tokens of prompt and 12 of response."""

    contestants: dict[str, Callable[[list[list[int]]], Seconds]] = {
        "256 compositions": lambda ids: run(plugin, ids, 12, [three() for _ in ids]),
        "1 composition": lambda ids: run(plugin, ids, 12, [three()] * len(ids)),
    }
    seconds = interleaved(contestants, rounds, lambda: prompts(256, 8, chosen), chosen)
    return report(
        "batch of 256, 8 tokens of prompt, 12 of response", seconds, [("256 compositions", "1 composition")], 256 * 12
    )


def first(stock: Engines, plugin: Engines, run: Any, rounds: int, chosen: random.Random, *, gates: bool = False) -> Any:
    """The first token of one request with 256 tokens of prompt."""
    known, conditional = three(), gated("when")
    contestants: dict[str, Callable[[list[list[int]]], Seconds]] = {
        "stock": lambda ids: run(stock, ids, 1),
        "stock again": lambda ids: run(stock, ids, 1),
        "nothing steered": lambda ids: run(plugin, ids, 1),
        "steered": lambda ids: run(plugin, ids, 1, [known]),
        "steered by a new composition": lambda ids: run(plugin, ids, 1, [three()]),
        "steered by 4 new projections": lambda ids: run(plugin, ids, 1, [four()]),
    }
    if gates:
        contestants["with a gate"] = lambda ids: run(plugin, ids, 1, [conditional])
        contestants["with a new gate"] = lambda ids: run(plugin, ids, 1, [gated("when")])
    seconds = interleaved(contestants, 4 * rounds, lambda: prompts(1, 256, chosen), chosen)
    pairs = [(name, "stock") for name in contestants if name != "stock"]
    return report("time to first token, 256 tokens of prompt (a ratio below 1 is slower)", seconds, pairs, 1)


def admission(plugin: Engines, chosen: random.Random) -> Any:
    """New compositions, 64 at a time (of many slots, 8 at a time), five times."""
    found: dict[str, Any] = {}
    print("\nadmission of a new composition at 30 layers: front end, and stall of the step; processor time, ms")
    for make in (three, four, phased, termed):
        spent: dict[str, list[float]] = {"admit": [], "begin": []}
        for _ in range(5):
            ids = prompts(8 if make is phased else 64, 4, chosen)
            for name, seconds in plugin.call("measure", jobs=jobs(ids, 1, [make() for _ in ids]))["spent"].items():
                spent[name] += sorted(seconds)
        found[make.__name__] = spent
        for name, seconds in spent.items():
            seconds.sort()
            p99 = seconds[int(0.99 * len(seconds))]
            print(
                f"  {make.__name__:7} {name}: median {median(seconds) * 1e3:.2f}, 99 % {p99 * 1e3:.2f}, most "
                f"{seconds[-1] * 1e3:.2f}",
                flush=True,
            )
    return {"admission": found}


def stall(plugin: Engines, rounds: int, chosen: random.Random) -> Any:
    """Plain requests beside one sequential client."""
    senders: dict[str, Callable[[], str | None] | None] = {
        "none": None,
        "plain requests": lambda: None,
        "8 phases of 4 clamps": phased,
        "128 terms": termed,
    }
    seconds: dict[str, list[float]] = {name: [] for name in senders}
    longest: dict[str, list[float]] = {name: [] for name in senders}
    for number in range(-1, rounds):
        ids = prompts(16, 16, chosen)
        others = prompts(96, 4, chosen)
        for name in chosen.sample(list(senders), len(senders)):
            make = senders[name]
            sent = [] if make is None else jobs(others, 1, [make() for _ in others])  # type: ignore[misc]
            took = plugin.call("beside", jobs=jobs(ids, 48, None), others=sent)
            if number >= 0:
                seconds[name].append(took["seconds"])
                longest[name].append(max(took["steps"][2:]))
    print(f"\n16 plain requests beside one sequential client; {rounds} rounds")
    for name in senders:
        ratio = interval([b / a for a, b in zip(seconds["plain requests"], seconds[name], strict=True)])
        print(
            f"  beside {name:22} {median(seconds[name]):6.3f} s, longest step {median(longest[name]) * 1e3:6.1f} ms; "
            f"time / beside plain requests: {ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})",
            flush=True,
        )
    return {"stall": seconds, "longest": longest}


if __name__ == "__main__":
    main()
