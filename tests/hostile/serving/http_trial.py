"""The server under hostile and mixed load: `make hostile`, or `python tests/hostile/serving/http_trial.py --help`.

Plain answers of stock vLLM are recorded first, one at a time, and then those of `steer serve`, plain and steered. Then
requests of all kinds arrive, many at once: arms, expressions, streams, names that are rebound under them, uploads,
malformed and fuzzed ones, and clients that hang up. At the end the server must live, hold no slots, and answer as at
the beginning, bit for bit; every steered answer's header, receipt and log-probabilities must be of one composition;
memory must be flat, and no traceback in the log. Prints a table; the exit status is 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pico
import torch
from engine_process import NO_V2, RUNNERS, SIZE, environment_of
from http_checks import Trial, content
from http_client import Client
from http_traffic import PROMPTS, completion

from steer.serving import launch
from vectors import references
from vectors.events import Event
from vectors.steering import SteeringVector

ARMS = {"friendly": "2*warm - formal", "late": "1.5*warm@response"}
KEY = "hostile-trial"
# Most MiB by which the processes may grow after the first quarter. The engine of stock vLLM on a CPU grew by 414 MiB
# between 500 and 3,000 plain requests of this model (with the plugin by 159), so a bound on it only finds a flood.
GROWTH = {"front end": 32.0, "engine": 600.0}


def vectors_for(folder: Path, hidden: int, layers: int, norm: float) -> dict[str, Path]:
    """Random vectors that act in the middle of the model."""
    generator, paths = torch.Generator().manual_seed(3), {}
    for name in ("warm", "formal", "calm"):
        directions = {i: torch.randn(hidden, generator=generator) for i in range(layers)}
        scaled = {i: norm * direction / direction.norm() for i, direction in directions.items()}
        paths[name] = folder / f"{name}.safetensors"
        SteeringVector(scaled, {"apply": [layers // 3, layers // 2]}).save(paths[name])
    return paths


def memory(pid: int) -> dict[str, float]:
    """The resident memory in MiB of a server's front end, and of the processes below it: the engine."""
    parents, sizes = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue
        process = int(status.parent.name)
        parents[process], sizes[process] = int(fields["PPid"]), int(fields.get("VmRSS", "0 kB").split()[0]) / 1024

    def below(process: int) -> bool:
        return process == pid or (process in parents and parents[process] != process and below(parents[process]))

    engine = sum(size for process, size in sizes.items() if process != pid and below(process))
    return {"front end": sizes.get(pid, 0.0), "engine": engine}


@contextmanager
def server(
    folder: Path, model: Path, vectors: dict[str, Path] | None, runner: dict[str, str]
) -> Iterator[launch.Server]:
    """`vllm serve`, with the plugin and these vectors, or stock."""
    settings = {
        "vectors": {name: str(path) for name, path in (vectors or {}).items()},
        "arms": ARMS if vectors else {},
        "folders": [str(folder / "more")],
    }
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **runner}
    if vectors is None:
        environment["VLLM_PLUGINS"] = ""
    port = _free_port()
    flags = (
        "--enforce-eager",
        "--dtype",
        "float32",
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "64",
        "--disable-uvicorn-access-log",
        # Few blocks for keys and values, so that all are in use, and their memory resident, long before the end.
        "--num-gpu-blocks-override",
        "160",
    )
    log = folder / ("steered.log" if vectors else "stock.log")
    with launch.served(model, settings, name="smollm2", port=port, flags=flags, log=log, environment=environment,
                       api_keys=[KEY], on_event=lambda event: _say(event)) as running:  # fmt: skip
        yield running


def _say(event: Event) -> None:
    print(f"  {event.stage}", flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def attack(
    running: launch.Server, stock: dict[tuple[str, str], Any], vectors: dict[str, bytes], arguments: Any
) -> list[str]:
    """The whole trial of a running server; returns what was wrong."""
    client = Client("127.0.0.1", int(running.url.rpartition(":")[2]), KEY)
    trial = Trial(client, "smollm2", vectors, ARMS, arguments.seed)
    await trial.prepare()
    before = await trial.record()
    trial.expect(before)
    wrong = [f"plain differs from stock before the load: {key}" for key in stock if content(before[key]) != stock[key]]
    quarter = await trial.run(arguments.requests // 4, arguments.at_once, arguments.minutes * 15)
    size = memory(running.process.pid)
    started = time.monotonic()
    trial.seed += 1
    rest = await trial.run(arguments.requests - quarter, arguments.at_once, arguments.minutes * 45)
    seconds = time.monotonic() - started
    values = await trial.require_idle()
    grown = {name: now - size[name] for name, now in memory(running.process.pid).items()}
    after = await trial.record()
    wrong += [f"plain differs from stock after the load: {key}" for key in stock if content(after[key]) != stock[key]]
    trial.require_same(before, after)
    state = (await client.send("GET", "/steer")).value
    names = {name for name in state["vectors"] if not name.startswith("up-")}
    if names != {*vectors, "turning"}:
        wrong.append(f"the vectors at the end are {sorted(state['vectors'])}")
    tracebacks = running.log.read_text(errors="replace").count("Traceback (most recent call last)")
    if tracebacks:
        wrong.append(f"{tracebacks} tracebacks in the server's log")
    if running.process.poll() is not None:
        wrong.append("the server has ended")
    for name, more in grown.items():
        print(f"memory of the {name}: {size[name]:.0f} MiB after a quarter of the requests, {more:+.0f} MiB at the end")
        if more > GROWTH[name]:
            wrong.append(f"the memory of the {name} grew by {more:.0f} MiB after the first quarter")
    print(trial.table())
    refused = sum(value for name, value in values.items() if name.startswith("steer:refused_total"))
    print(f"{quarter + rest} requests, {rest / seconds:.1f} a second; {refused:.0f} refusals counted by the server")
    print(f"log-probabilities of a request in a batch and alone differ by at most {trial.furthest:.2g}")
    return wrong + trial.faults


def main() -> None:
    """Run the trial on one runner or on both, and print what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="requests for each runner")
    parser.add_argument("--at-once", type=int, default=64, help="requests at once")
    parser.add_argument("--minutes", type=float, default=60.0, help="most minutes of load for each runner")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2", help="a model, or `pico`: a Llama of 4 blocks, 320 tokens")
    parser.add_argument("--norm", type=float, help="length of the random vectors (30, or 3 for pico)")
    parser.add_argument("--runner", choices=(*RUNNERS, "both"), default="v1")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="steer-hostile-pico-") as temporary:
        small = arguments.model == "pico"
        model = str(pico.save(Path(temporary) / "pico", "llama", **SIZE)) if small else arguments.model
        arguments.norm = arguments.norm or (3.0 if small else 30.0)
        wrong = trials(arguments, model)
    print("\n".join(f"WRONG {fault[:600]}" for fault in wrong[:40]) or "nothing was wrong")
    sys.exit(bool(wrong))


def trials(arguments: argparse.Namespace, model: str) -> list[str]:
    """The trial of a model on one runner or on both; returns what was wrong."""
    source = references.resolve(model)
    identity = references.identity(source)
    wrong = []
    for runner in RUNNERS if arguments.runner == "both" else (arguments.runner,):
        environment = environment_of(runner)
        if environment is None:
            wrong.append(f"{runner} was not run: {NO_V2}")
            continue
        with tempfile.TemporaryDirectory(prefix="steer-hostile-") as temporary:
            folder = Path(temporary)
            (folder / "more").mkdir()
            vectors = vectors_for(folder, identity["hidden_size"], identity["layers"], arguments.norm)
            print(f"{runner}: stock vLLM", flush=True)
            with server(folder, source.path, None, environment) as stock:
                recorded = asyncio.run(_stock(Client("127.0.0.1", int(stock.url.rpartition(":")[2]), KEY)))
            print(f"{runner}: steer serve", flush=True)
            with server(folder, source.path, vectors, environment) as running:
                contents = {name: path.read_bytes() for name, path in vectors.items()}
                found = asyncio.run(attack(running, recorded, contents, arguments))
                if found:
                    saved = Path(tempfile.gettempdir()) / f"steer-hostile-{runner}.log"
                    saved.write_bytes(running.log.read_bytes())
                    print(f"the server's log is {saved}")
            wrong += [f"{runner}: {fault}" for fault in found]
    return wrong


async def _stock(client: Client) -> dict[tuple[str, str], Any]:
    answers = {}
    for prompt in PROMPTS:
        answer = await client.send("POST", "/v1/completions", completion("smollm2", prompt))
        answers[prompt, ""] = content(answer)
    return answers


if __name__ == "__main__":
    main()
