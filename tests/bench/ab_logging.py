"""What the log of an experiment costs: requests per second with it and without it, on one running server, in turns.

    .venv/bin/python tests/bench/ab_logging.py [--minutes 4] [--requests 500] [--tokens 16] [--bundled] [--json FILE]

`steer serve` runs an experiment whose arms all are the control, so that requests to the experiment and to the model do
the same work but for assignment, measuring, journal and log. Each round sends the same prompts to both, 32 at a time,
in an order drawn anew, and waits in between until all rows are in the log. The ratio is taken within the round. Printed
is the geometric mean of the ratios with a 95 % interval (bootstrap over rounds), and the same of the processor time of
the API server per request, with the mean of the differences. The model is a pico model, on which everything beside the
model weighs most; with `--bundled` it is smollm2. `--pool FILE…` adds the rounds of earlier reports, which `--json`
writes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# In this order: tests/ has folders named as packages are.
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "steer" / "serving" / "http")]

from serve_process import ENVIRONMENT, STEER, Serving, free_port  # noqa: E402
from serving import interval  # noqa: E402

AT_ONCE = 32
COLLECTED = 1.3  # seconds after which the writer has taken up the last rows
EXPERIMENT = {
    "name": "tone", "salt": "tone-salt", "unit": "user", "metric": {"name": "thumbs"},
    "arms": {"control": {"weight": 1.0}, "warm": {"steer": "warm", "weight": 0.0}},
}  # fmt: skip


class Bundled(Serving):
    """`steer serve smollm2` with the experiment, under the name of the pico model."""

    def __init__(self, folder: Path) -> None:
        (folder / "key.txt").write_text("")
        self.folder, self.port = folder, free_port()
        arms = {"control": {"weight": 1.0}, "prompt": {"system": "Answer warmly.", "weight": 0.0}}
        (folder / "tone.yaml").write_text(json.dumps({**EXPERIMENT, "arms": arms}))
        self.err = (folder / "err.txt").open("w")
        command = [*STEER, "serve", "smollm2", "--experiment", "tone.yaml", "--port", str(self.port)]
        command += ["--log", str(folder / "vllm.log"), "--", "--enforce-eager", "--max-model-len", "256"]
        command += ["--max-num-seqs", str(AT_ONCE), "--served-model-name", "pico"]
        environment = {**os.environ, **ENVIRONMENT}
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.err, env=environment, cwd=folder)


async def send(port: int, model: str, prompts: list[str], tokens: int) -> float:
    """The seconds that all requests take together, over as many connections as are sent at once.

    The client does as little as it can: it shares the cores with the server.
    """
    waiting = [
        json.dumps({
            "model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens,
            "user": f"u{number}", "ignore_eos": True,
        }).encode()
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while waiting:
            body = waiting.pop()
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            status, *lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
            (length,) = (int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
            answer = await reader.readexactly(length)
            assert b" 200 " in status, answer
        writer.close()

    began = time.monotonic()
    await asyncio.gather(*(connection() for _ in range(AT_ONCE)))
    return time.monotonic() - began


def processor(server: Serving) -> float:
    """The processor seconds of the API server so far."""
    found = subprocess.run(
        ["ps", "--ppid", str(server.process.pid), "-o", "pid="], capture_output=True, text=True, check=True
    )
    fields = Path(f"/proc/{found.stdout.split()[0]}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def written(server: Serving) -> dict[str, Any]:
    """The state of the log once all rows are in it."""
    time.sleep(COLLECTED)
    while True:
        state: dict[str, Any] = server.call("GET", "/steer/experiments")[2]["experiments"]["tone"]["log"]
        if not state["waiting"]:
            return state
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--bundled", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pool", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    chosen = random.Random(0)
    seconds: dict[str, list[float]] = {"pico": [], "tone": []}
    spent: dict[str, list[float]] = {"pico": [], "tone": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tone.yaml").write_text(json.dumps(EXPERIMENT))
        flags = ("--max-num-seqs", str(AT_ONCE))
        server = Bundled(folder) if options.bundled else Serving(folder, *flags, experiments=["tone.yaml"])
        try:
            server.wait()
            begin = time.monotonic()
            number = 0
            while number < 2 or time.monotonic() < begin + 60 * options.minutes:
                prompts = [f"{number} {i} {chosen.random()}" for i in range(options.requests)]
                order = ["pico", "tone"]
                chosen.shuffle(order)
                for model in order:
                    before = processor(server)
                    took = asyncio.run(send(server.port, model, prompts, options.tokens))
                    state = written(server)
                    if number > 0:  # the first round warms up
                        seconds[model].append(took)
                        spent[model].append(processor(server) - before)
                number += 1
        finally:
            server.close()
    for file in options.pool:
        earlier = json.loads(file.read_text())["values"]
        for model in seconds:
            seconds[model] += earlier["seconds"][model]
            spent[model] += earlier["spent"][model]
    rounds, requests = len(seconds["pico"]), len(seconds["pico"]) * options.requests
    more = [1000 * (on - off) / options.requests for off, on in zip(*spent.values(), strict=True)]
    report: dict[str, Any] = {
        "throughput_on_over_off": interval([off / on for off, on in zip(*seconds.values(), strict=True)]),
        "processor_on_over_off": interval([on / off for off, on in zip(*spent.values(), strict=True)]),
        "processor_ms_more": [math.log(each) for each in interval([math.exp(each) for each in more])],
        "rounds": rounds, "requests_of_a_round": options.requests,
        "requests_per_second": {model: requests / sum(values) for model, values in seconds.items()},
        "processor_ms_per_request": {model: 1000 * sum(values) / requests for model, values in spent.items()},
        "log": state,
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps({**report, "values": {"seconds": seconds, "spent": spent}}))


if __name__ == "__main__":
    main()
