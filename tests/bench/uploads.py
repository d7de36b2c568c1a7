"""How long `/health` takes while a client uploads: `steer serve` with the bundled model, and a client of each kind.

    .venv/bin/python tests/bench/uploads.py [--seconds 8] [--compile]

One thread asks `/health` every 5 ms over one connection; another sends, again and again: nothing; 64 MB as a vector,
with its length announced and in chunks without; a file whose header is full of tiny tensors; the largest vector that
the model may have; 64 MB as the body of a chat request. What is printed is the time of `/health`: median, 99 % and
most. The aim is 20 ms. Half of the machine's cores serve, so measure on one that does nothing else.
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
    chat = json.dumps({"model": "smollm2", "prompt": "x" * SIZE, "max_tokens": 1}).encode()
    vectors = [vector(i) for i in range(64)]
    return {
        "nothing": lambda n: time.sleep(0.1),
        "64 MB, announced": lambda n: post(port, upload.format(n), zeros, kind),
        "64 MB in chunks": lambda n: post(port, upload.format(n), chunks(SIZE), kind),
        "100,000 tiny tensors": lambda n: post(port, upload.format(n), many, kind),
        "the largest vector": lambda n: post(port, upload.format(n), vectors[n % 64], kind),
        "64 MB to /v1/completions": lambda n: post(port, "/v1/completions", chat, "application/json"),
    }


def measure(port: int, send: Callable[[int], None], seconds: float) -> tuple[list[float], int]:
    """The milliseconds of each `/health` while another thread sends, and how often it sent."""
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
    took, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        before = time.perf_counter()
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        took.append((time.perf_counter() - before) * 1e3)
        assert answer.status == 200
        time.sleep(0.005)
    done.set()
    thread.join(60)
    connection.close()
    return sorted(took), sent


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
        with launch.served(model, settings, name="smollm2", port=arguments.port, flags=flags):
            print(f"{machine()}; smollm2; ms of /health, asked every 5 ms for {arguments.seconds:g} s", flush=True)
            for what, send in senders(arguments.port).items():
                if arguments.only and arguments.only not in what:
                    continue
                send(1_000)  # warms up
                took, sent = measure(arguments.port, send, arguments.seconds)
                print(
                    f"  {what:26} median {median(took):5.1f}, 99 % {took[int(0.99 * len(took))]:5.1f}, most "
                    f"{took[-1]:5.1f}{' (the aim is missed)' if took[-1] > AIM else ''}; sent {sent} times",
                    flush=True,
                )


if __name__ == "__main__":
    main()
