"""Every command that writes, run in processes that are forked with all libraries loaded.

A command starts in 3 seconds and works for half a second, so most signals to a new process would hit imports. Here the
forked process does nothing but the command itself, through the same entry (`steer.cli.run`) with the same handlers.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pico
import torch
import tqdm

from steer.cli import run
from steer.serving import launch
from vectors.steering import SteeringVector
from vectors.storage import locks

tqdm.tqdm.monitor_interval = 0  # it would start a thread, and a fork copies none

NEW_PID_NAMESPACE = 0x20000000  # CLONE_NEWPID of unshare(2)
WORDS = ("sun", "rain", "warm", "cold")
SERVER = """
import http.server, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

Command = Callable[[], int]


def make_inputs(folder: Path) -> None:
    """Models, vectors and examples, and a cache of their own."""
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    pico.save(folder / "base", "llama")
    model = pico.build("llama")
    for seed, name in enumerate(("one", "two"), 1):
        shutil.copytree(folder / "base", folder / name)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
        model.save_pretrained(folder / name)
    direction = torch.randn(pico.HIDDEN, generator=torch.Generator().manual_seed(4))
    SteeringVector({1: 4 * direction / direction.norm()}).save(folder / "warm.safetensors")
    for name in ("pos", "neg"):
        lines = [{"prompt": f"{a} {b}?", "completion": f" the {name} and {b}"} for a in WORDS for b in WORDS]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "server.py").write_text(SERVER)


def commands(folder: Path) -> dict[str, Command]:
    """The commands by name; each writes `out` (or `out.SUFFIX`) in the current folder."""
    base, one, two, warm = (str(folder / name) for name in ("base", "one", "two", "warm.safetensors"))
    pos, neg, extracted = (str(folder / name) for name in ("pos.jsonl", "neg.jsonl", "extracted.safetensors"))
    task = str(folder / "task.safetensors")
    bake = ("bake", "--model", base, "-o", "out")
    train = (*bake, "--mode", "train", "--data", pos, "--steps", "4", "--lr", "1e-2", "--replay", "0.2")
    lines: dict[str, tuple[str, ...]] = {
        "extract": ("extract", "--pos", pos, "--neg", neg, "--model", base, "-o", "out.safetensors", "--force"),
        "convert to gguf": ("vectors", "convert", warm, "out.gguf", "--force"),
        "convert": ("vectors", "convert", warm, "out.safetensors", "--force"),
        "plot": ("vectors", "plot", extracted, "-o", "out.svg", "--force"),
        "diff": ("diff", base, one, "-o", "out.safetensors", "--force"),
        "diff sparse": ("diff", base, one, "-o", "out.safetensors", "--storage", "sparse:0.1", "--force"),
        "diff to lora": ("diff", base, one, "-o", "out", "--to-lora", "4"),
        "merge": ("merge", one, two, "--base", base, "--method", "ties", "-o", "out"),
        "merge to vector": ("merge", one, two, "--base", base, "--ties", "-o", "out.safetensors", "--force"),
        "apply": ("apply", base, task, "-o", "out"),
        "fold": (*bake, "2*warm", "--vector", f"warm={warm}", "--any-base", "--skip-vllm"),
        "bake to lora": (*train, "--as", "lora"),
        "bake to vector": (*train[:4], "out.safetensors", *train[5:], "--as", "vector", "--force"),
        "bake": (*train, "--as", "model"),
    }
    made: dict[str, Command] = {name: (lambda line=line: run(list(line))) for name, line in lines.items()}
    return made | {"serve": lambda: _serve(folder)}


def load(commands: Mapping[str, Command], folder: Path) -> None:
    """Import what the commands import, and compile what they compile, in this process."""
    for name in ("accelerate", "matplotlib.figure", "peft", "gguf", "steer.training.api", "steer.folding.fold"):
        importlib.import_module(name)
    before, output = os.getcwd(), io.StringIO()
    os.chdir(folder)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        for name in ("extract", "diff", "merge", "fold"):
            assert commands[name]() == 0, output.getvalue()
            shutil.rmtree("out", ignore_errors=True)
    os.chdir(before)
    gc.collect()
    threads = [thread.name for thread in threading.enumerate()]
    assert threads == ["MainThread"], f"a fork copies no threads: {threads}"


def _serve(folder: Path) -> int:
    """What `steer serve` does, with a server that needs no model; temporary files are made in the current folder."""
    tempfile.tempdir = os.getcwd()
    start, port = launch.subprocess.Popen, str(20_000 + os.getpid() % 20_000)

    def popen(_command: object, **more: object) -> object:
        return start([sys.executable, str(folder / "server.py"), "--port", port], **more)  # type: ignore[call-overload]

    launch.subprocess.Popen = popen  # type: ignore[assignment,misc]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with launch.served(folder, {}, name="m", port=int(port)):
            time.sleep(0.2)
    except SystemExit as ended:
        return int(ended.code or 0)
    except KeyboardInterrupt:
        return 1
    finally:
        locks.remove_unfinished_of_this_process()  # as `steer.cli.run` does
    return 0


def start(command: Command, folder: Path, *, log: Path, namespace: bool = False) -> int:
    """Fork a process that runs a command in `folder`; returns its id. With `namespace` the command is process 1."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        code = _in_namespace(command) if namespace else command()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _in_namespace(command: Command) -> int:
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_PID_NAMESPACE):
        raise OSError(ctypes.get_errno(), "unshare")
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 99
    try:
        assert os.getpid() == 1
        code = command()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def namespaces_work() -> bool:
    """Whether this user can make a PID namespace."""
    pid = os.fork()
    if not pid:
        os._exit(bool(ctypes.CDLL(None).unshare(NEW_PID_NAMESPACE)))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def wait(pid: int, seconds: float = 120) -> int:
    """The exit code of a process (negative for a signal). Raises TimeoutError, after killing it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"a process did not end within {seconds} s")


def tree(folder: Path) -> dict[str, str]:
    """All files below a folder, by name, with their SHA-256; of links and others the kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            found[name] = "other"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not any(path.iterdir()):
            found[name] = "empty folder"
    return found
