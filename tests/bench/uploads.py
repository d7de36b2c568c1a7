"""How long `/health` takes while a client uploads: `steer serve` with the bundled model, and a client of each kind.

    .venv/bin/python tests/bench/uploads.py [--seconds 8] [--compile]

One thread asks `/health` every 5 ms over one connection; another sends, again and again: nothing; 64 MB as a vector,
with its length announced and in chunks without; a file whose header is full of tiny tensors; the largest vector that
the model may have; 64 MB as the body of a request, announced and in chunks; the largest body that is taken, one text
and as many lists as it may have. What is printed is the time of `/health`: median, 99 %, 99.9 % and most. The aim is
20 ms for 99.9 %. Client and server share the cores, so the same is printed without the time in which the thread that
asks or the server's event loop could run and had no core (Linux counts it); that is what the server itself needs.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from figures import machine  # noqa: E402

SIZE = 64_000_000
LARGEST = (1 << 20) - 1000  # of a text, so that the body has just less than --max-body
HIDDEN, LAYERS = 576, 30  # of smollm2
AIM = 20.0  # ms


def chunks(total: int) -> Iterator[bytes]:
    """A body in parts of 64 KiB, without a length."""
    for _ in range(total // 65_536):
        yield bytes(65_536)


def post(port: int, path: str, body: bytes | Iterator[bytes], kind: str) -> None:
    """Send a request. The server may close the connection before it has read all."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, body, {"Content-Type": kind}, encode_chunked=not isinstance(body, bytes))
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        pass
    finally:
        connection.close()


def tiny() -> bytes:
    """A file of 100,000 tensors."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps({f"layer.{i}": entry for i in range(100_000)}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


def vector(number: int) -> bytes:
    """A vector of the model, with metadata as large as it may be."""
    import torch

    from vectors.steering import SteeringVector

    layers = {i: torch.full((HIDDEN,), float(number + i + 1)) for i in range(LAYERS)}
    return SteeringVector(layers, {"note": "x" * 200_000}).encode()


def senders(port: int) -> dict[str, Callable[[int], None]]:
    """What a client sends, by name; called with 0, 1, 2, ..."""
    kind, upload = "application/octet-stream", "/steer/vectors?name=v{}"
    many, zeros = tiny(), bytes(SIZE)
    chat, largest = (
        json.dumps({"model": "smollm2", "prompt": "x" * size, "max_tokens": 1}).encode() for size in (SIZE, LARGEST)
    )
    lists = b'{"model": "smollm2", "prompt": [' + b"[]," * 9_990 + b"[1]]}"
    json_kind = "application/json"
    vectors = [vector(i) for i in range(64)]
    return {
        "nothing": lambda n: time.sleep(0.1),
        "64 MB, announced": lambda n: post(port, upload.format(n), zeros, kind),
        "64 MB in chunks": lambda n: post(port, upload.format(n), chunks(SIZE), kind),
        "100,000 tiny tensors": lambda n: post(port, upload.format(n), many, kind),
        "the largest vector": lambda n: post(port, upload.format(n), vectors[n % 64], kind),
        "64 MB to /v1/completions": lambda n: post(port, "/v1/completions", chat, json_kind),
        "64 MB to it in chunks": lambda n: post(port, "/v1/completions", chunks(SIZE), json_kind),
        "1 MiB to it": lambda n: post(port, "/v1/completions", largest, json_kind),
        "9,991 lists to it": lambda n: post(port, "/v1/completions", lists, json_kind),
    }


def waited(task: str) -> float:
    """The milliseconds for which a thread could run and had no core, since its start; 0 where nothing counts them."""
    try:
        return int(Path(f"/proc/{task}/schedstat").read_text().split()[1]) / 1e6
    except (OSError, IndexError):
        return 0.0


def measure(
    port: int, process: int, send: Callable[[int], None], seconds: float
) -> tuple[list[float], list[float], int]:
    """The milliseconds of each `/health` while another thread sends, in all and with a core; and how often it sent."""
    done, sent = threading.Event(), 0

    def client() -> None:
        nonlocal sent
        while not done.is_set():
            send(sent)
            sent += 1

    thread = threading.Thread(target=client, daemon=True)
    thread.start()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    tasks = "thread-self", str(process)  # the event loop runs in the first thread of the process
    took, ran, end = [], [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        before, waits = time.perf_counter(), sum(map(waited, tasks))
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        took.append((time.perf_counter() - before) * 1e3)
        ran.append(max(0.0, took[-1] - (sum(map(waited, tasks)) - waits)))
        assert answer.status == 200
        time.sleep(0.005)
    done.set()
    thread.join(60)
    connection.close()
    return sorted(took), sorted(ran), sent


def figures(milliseconds: list[float]) -> str:
    """The median, 99 %, 99.9 % and the most of sorted milliseconds."""
    parts = {"99 %": 0.99, "99.9 %": 0.999}
    return ", ".join(
        [
            f"median {median(milliseconds):5.1f}",
            *(f"{name} {milliseconds[int(share * len(milliseconds))]:5.1f}" for name, share in parts.items()),
            f"most {milliseconds[-1]:5.1f}",
        ]
    )


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="for each kind of upload")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--compile", action="store_true", help="compile the model, as `steer serve` does by default")
    parser.add_argument("--only", help="only senders whose name has this text")
    arguments = parser.parse_args()
    from steer.serving import launch
    from vectors import references

    model = references.resolve("smollm2").path
    flags = ["--max-model-len", "1024", *([] if arguments.compile else ["--enforce-eager"])]
    with tempfile.TemporaryDirectory() as name:
        settings = {"vectors": {}, "arms": {}, "folders": [name]}
        with launch.served(model, settings, name="smollm2", port=arguments.port, flags=flags) as server:
            print(f"{machine()}; smollm2; ms of /health, asked every 5 ms for {arguments.seconds:g} s", flush=True)
            for what, send in senders(arguments.port).items():
                if arguments.only and arguments.only not in what:
                    continue
                send(1_000)  # warms up
                took, ran, sent = measure(arguments.port, server.process.pid, send, arguments.seconds)
                missed = ran[int(0.999 * len(ran))] > AIM
                print(f"  {what} ({len(took)} asked, sent {sent} times)")
                print(f"    in all        {figures(took)}")
                print(f"    with a core   {figures(ran)}{' (the aim is missed)' if missed else ''}", flush=True)


if __name__ == "__main__":
    main()
