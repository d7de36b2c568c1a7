"""`steer serve` on a pico model as a process, for the tests of this folder, and calls to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine_process import ENVIRONMENT, random_vectors, save_model

from steer.store import creation, layout, refs
from steer.store.layout import Store
from steer.store.working import document
from steer.store.working import folder as versions

KEY = "secret"
# -P: whatever folder the tests run in, its own folder `steer` must not stand before the package.
# A shell's background job, as CI may be, begins with SIGINT ignored.
LISTEN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
STEER = (sys.executable, "-P", "-c", f"{LISTEN}; from steer.cli import main; main()")
MESSAGES = [{"role": "user", "content": "the warm and the cold"}]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def personality(folder: Path, model: Path) -> Store:
    """A store in the folder whose tone@champion is 0.5*formal on the model, or the one of an earlier server."""
    if (folder / ".steer").is_dir():
        return layout.require(folder)
    store = creation.create(folder, "tone")
    document.write(store.file, f"base: {model}\nparts: []\n")
    promote(store, formal=0.5)
    return store


def promote(store: Store, **strengths: float) -> str:
    """Commit these strengths of parts, and let tone@champion be the commit; returns its digest."""
    for name, strength in strengths.items():
        document.set_part(store.file, name, {"strength": strength})
    made = versions.commit(store, str(strengths), "steer commit").digest
    refs.point(store, {refs.alias("tone", "champion"): made}, "steer promote")
    return made


class Serving:
    """`steer serve` on a pico model: the champion of a personality, and the arm friendly."""

    def __init__(
        self,
        folder: Path,
        *flags: str,
        key: str | None = None,
        experiments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "key.txt").write_text(key or "")
        self.folder, self.port = folder, free_port()
        self.model = save_model(folder, "llama")
        self.vectors = random_vectors(folder)
        self.store = personality(folder, self.model)
        (folder / "more").mkdir(exist_ok=True)
        without = {k: v for k, v in ENVIRONMENT.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        self.err = (folder / "err.txt").open("w")
        command = [
            *(*STEER, "serve", "tone@champion"),
            *("--vector", f"warm={self.vectors['warm']}"),  # formal.safetensors lies in the current folder
            *(("--api-key-file", str(folder / "key.txt")) if key else ()),
            *(word for file in experiments for word in ("--experiment", file)),
            *("--arm", "friendly=1.2*warm - 0.4*formal", "--port", str(self.port)),
            *("--vector-folder", str(folder / "more"), "--steer-gates", "1"),
            *("--log", str(folder / "vllm.log"), "--"),
            *(
                "--enforce-eager",
                "--max-model-len",
                "256",
                "--max-num-seqs",
                "8",
                "--served-model-name",
                "pico",
                *flags,
            ),
        ]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self.err,
            env={**os.environ, **ENVIRONMENT, **without, **(environment or {})},
            cwd=folder,
        )

    def wait(self) -> None:
        end = time.monotonic() + 240
        while "serving at" not in self.said():
            assert self.process.poll() is None, self.said() + (self.folder / "vllm.log").read_text()[-3000:]
            assert time.monotonic() < end, self.said()
            time.sleep(0.3)

    def said(self) -> str:
        return (self.folder / "err.txt").read_text()

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = KEY,
        raw: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, str], Any]:
        data = raw if raw is not None else json.dumps(body).encode() if body is not None else None
        kind = "application/octet-stream" if raw is not None else "application/json"
        headers = {"Content-Type": kind, **(headers or {})}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                content = answer.read()
                plain = answer.headers.get_content_type() != "application/json"
                return answer.status, dict(answer.headers), content.decode() if plain else json.loads(content)
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), json.loads(error.read())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)
        self.err.close()
        assert self.process.stdout is not None
        self.process.stdout.close()


def chat(server: Serving, model: str = "pico", **more: Any) -> tuple[int, dict[str, str], Any]:
    body = {"model": model, "messages": MESSAGES, "max_tokens": 5, "temperature": 0, "ignore_eos": True, **more}
    return server.call("POST", "/v1/chat/completions", body)


def steer(expression: Any) -> dict[str, Any]:
    return {"vllm_xargs": {"steer": expression}}


def children(process: int) -> set[int]:
    """The processes that descend from one."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    parents = dict(zip(map(int, found[::2]), map(int, found[1::2]), strict=True))
    chain = lambda pid: pid in parents and (parents[pid] == process or chain(parents[pid]))  # noqa: E731
    return {pid for pid in parents if chain(pid)}
