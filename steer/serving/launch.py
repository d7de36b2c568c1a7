"""`vllm serve` as a child process: started, waited for until it answers, and ended with all its own children."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.serving import keys, processor
from steer.serving.address import Address, address_of, answers, problems_of_flags
from steer.serving.flags import served_name
from steer.serving.settings import CONFIG, NAME
from vectors.errors import OutputError, SteerError, UsageError
from vectors.events import Event, OnEvent, ignore
from vectors.storage.files import write_atomically
from vectors.storage.locks import remove_leftovers, temporary_folder_and_lock

GRACE = (20.0, 5.0, 5.0)  # seconds to wait for the end after SIGINT, SIGTERM and SIGKILL
STARTING = 2.0  # seconds after SIGINT before the server has answered once: it has no requests to finish
LINES = 12  # last lines of the log to show when the server dies without an exception

# A text in vLLM's log, and the stage that begins with it. The one that occurs last is the present stage.
STAGES = {
    "non-default args": "reading the model's configuration",
    "Initializing a V1 LLM engine": "starting the engine",
    "Starting to load model": "loading the weights",
    "Loading safetensors": "loading the weights",
    "Warming up model for the compilation": "compiling, minutes at the first start (-- --enforce-eager skips it)",
    "Starting vLLM server": "opening the port",
}


# The prefix of a line in vLLM's log, and the beginning of the line that names an exception.
_PREFIX = re.compile(r"^(\([\w ]+ pid=\d+\) )?((ERROR|CRITICAL) \S+ \S+ \[[^\]]*\] )?")
_MISSING = re.compile(r"ModuleNotFoundError: No module named '(\w+)")
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception): |\S+: error: ")


class ServerError(SteerError):
    """The server did not start, or died."""


@contextlib.contextmanager
def served(
    model: Path,
    settings: Mapping[str, Any],
    *,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    flags: Sequence[str] = (),
    log: Path | None = None,
    on_event: OnEvent = ignore,
    environment: Mapping[str, str] | None = None,
    api_keys: Sequence[str] = (),
) -> Iterator[Server]:
    """A context manager: a running server that answers requests, ended on exit.

    `settings` are the values of `serving.settings`, with absolute paths. `api_keys` reach the process through its
    environment, so that no list of processes shows them. `on_event` gets an event for every stage of the start. On
    exit, also by an error, no process is left, and no file but the log of a server that died.
    Raises UsageError, OutputError, ServerError.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "vLLM is not installed",
            "pip install 'steer-workbench[vllm]' on a machine with a GPU; without a GPU, make setup",
        )
    problems = problems_of_flags(flags)
    if problems:
        raise UsageError(problems, "steer serve --help lists what it takes itself")
    address = address_of(flags, host, port)
    if address.path is None:
        _require_port(host, port)
    environment = {**(environment or {}), keys.KEYS: json.dumps(list(api_keys))}
    temporary = Path(tempfile.gettempdir()).absolute()
    remove_leftovers(temporary)  # folders of servers whose launcher was killed
    with temporary_folder_and_lock(temporary / "steer-serve") as (folder, lock):
        try:
            with _served(model, settings, folder, lock, name, address, flags, log, on_event, environment) as server:
                yield server
        except ServerError as error:
            raise _with_saved_log(error, folder) from error


@contextlib.contextmanager
def _served(
    model: Path,
    settings: Mapping[str, Any],
    folder: Path,
    lock: int,
    name: str,
    address: Address,
    flags: Sequence[str],
    log: Path | None,
    on_event: OnEvent,
    environment: Mapping[str, str],
) -> Iterator[Server]:
    """Start the server and end it; `folder` holds its settings, and its log unless `log` names another file.

    `lock` is the folder's: the server inherits it, so that the folder stays until both have ended.
    """
    log = log or folder / "vllm.log"
    write_atomically(folder / "steer.json", json.dumps(settings).encode())
    arguments = ["--host", address.host, "--port", str(address.port), *flags]
    if served_name(flags) is None:
        arguments += ["--served-model-name", name]
    if cpu_build() and (chosen := processor.dtype_flags(model, flags)):
        arguments += chosen
        on_event(Event("starting vLLM", message=processor.REASON))
    try:
        output = log.open("ab")
    except OSError as error:
        raise OutputError(
            f"the log {log} can't be written: {error.strerror}", "choose another file: --log FILE"
        ) from error
    with output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "steer.serving.vllm_command", "serve", str(model), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_environment(folder / "steer.json"), **environment},
            start_new_session=True,
            pass_fds=(lock,),
            preexec_fn=functools.partial(_die_with, os.getpid()) if sys.platform == "linux" else None,
        )
    server = Server(process, address, log)
    try:
        server.wait_until_ready(on_event)
        yield server
    except (KeyboardInterrupt, SystemExit):
        if not server.answered and log.parent == folder:  # the log goes with the folder
            on_event(Event("ending the server", message=_tail(log)))
        raise
    finally:
        server.end()


def _tail(log: Path) -> str:
    """The last lines of the log of a server that was ended before it answered."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:]
    return "\n".join(["the last lines of the server's log, which had not answered yet:", *lines] if lines else [])


def _with_saved_log(error: ServerError, folder: Path) -> ServerError:
    """The error with the path of the log; a log in the temporary folder is moved to a file that stays."""
    log = folder / "vllm.log"
    if not log.exists():
        return error
    handle, saved = tempfile.mkstemp(prefix="steer-serve-", suffix=".log")
    os.close(handle)
    shutil.move(log, saved)
    return ServerError(error.problems, error.hint.replace(str(log), saved))


class Server:
    """A running `vllm serve`: its process, its address and its log."""

    def __init__(self, process: subprocess.Popen[bytes], address: Address, log: Path) -> None:
        self.process, self.address, self.url, self.log = process, address, address.url, log
        self.answered = False

    def wait_until_ready(self, on_event: OnEvent) -> None:
        """Return as soon as the server answers. Raises ServerError when it ends before that."""
        stage = ""
        while True:
            if self.process.poll() is not None:
                raise self.death("did not start")
            present = self._stage()
            if present != stage:
                stage = present
                on_event(Event(stage))
            if answers(self.address):
                self.answered = True
                return
            time.sleep(0.2)

    def wait(self) -> None:
        """Wait as long as the server runs. Raises ServerError when it ends; never returns."""
        self.process.wait()
        raise self.death("has ended")

    def death(self, what: str) -> ServerError:
        """The error for a server that has ended: its exit status, and the reason from its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        problem, log = f"the server {what}, with status {self.process.poll()}", f"the whole log is {self.log}"
        missing = _missing_package(lines)
        if missing is None:
            return ServerError([problem, *_reason(lines)], log)
        reason = f"vLLM's code for this model imports {missing}, which is not installed"
        return ServerError([problem, reason], f"{_installation(missing)}; {log}")

    def end(self) -> None:
        """End the server and all its children: SIGINT, then SIGTERM, then SIGKILL. Ctrl-C does not interrupt this."""
        with _uninterrupted():
            self._end()

    def _end(self) -> None:
        graces = GRACE if self.answered else (min(STARTING, GRACE[0]), *GRACE[1:])
        for number, grace in zip((signal.SIGINT, signal.SIGTERM, signal.SIGKILL), graces, strict=True):
            if not _alive(self.process):
                break
            with contextlib.suppress(ProcessLookupError):
                # SIGINT goes to the server alone, which shuts its engine down in order; the others to the whole group.
                (os.kill if number == signal.SIGINT else os.killpg)(self.process.pid, number)
            _wait(self.process, grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _stage(self) -> str:
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "starting vLLM"
        offsets = {stage: text.rfind(sign) for sign, stage in STAGES.items()}
        latest = max(offsets, key=lambda stage: offsets[stage])
        return latest if offsets[latest] >= 0 else "starting vLLM"


def _reason(lines: Sequence[str]) -> list[str]:
    """Why the server ended: the log's last exception, with up to three indented lines after it, else the last lines."""
    plain = [_PREFIX.sub("", line) for line in lines]
    for i in range(len(plain) - 1, -1, -1):
        if _EXCEPTION.match(plain[i]) and not plain[i].startswith("RuntimeError: Engine core initialization failed"):
            details = itertools.takewhile(lambda line: line.startswith("  "), plain[i + 1 : i + 4])
            return [plain[i].strip(), *(line.strip() for line in details)]
    return [line.strip() for line in plain[-LINES:] if line.strip()]


def _missing_package(lines: Sequence[str]) -> str | None:
    """The package that vLLM lacked when it imported a model's code, if it could not."""
    if not any("failed to be inspected" in line for line in lines):
        return None
    names = [match[1] for line in lines if (match := _MISSING.match(_PREFIX.sub("", line)))]
    return names[-1] if names else None


def _installation(package: str) -> str:
    """How to install a package that vLLM lacks; torchvision comes from where torch comes from."""
    index = " --index-url https://download.pytorch.org/whl/cpu" if package == "torchvision" and cpu_build() else ""
    return f"pip install {package}{index}"


def _environment(settings: Path) -> dict[str, str]:
    """The environment of the server: the plugin, beside other plugins; on the CPU, bounded memory and threads."""
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name and name != NAME]
    variables = {"VLLM_PLUGINS": ",".join([*plugins, NAME]), CONFIG: str(settings)}
    if cpu_build():
        # OpenMP's threads would spin while they wait, and starve what runs beside them.
        variables["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
        # By default vLLM reserves nearly all memory, and refuses to start when other programs use some of it.
        memory = processor.memory() // 2**30
        variables["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", str(max(1, min(8, memory // 6))))
        if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ and len(os.sched_getaffinity(0)) > 1:
            # The threads of the engine spin while they wait; the API server needs a core of its own beside them.
            variables["VLLM_CPU_NUM_OF_RESERVED_CPU"] = os.environ.get("VLLM_CPU_NUM_OF_RESERVED_CPU", "1")
    return variables


def cpu_build() -> bool:
    """Whether the installed vLLM is that for CPUs."""
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version("vllm-cpu"))
    return False


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Within: SIGINT and SIGTERM are ignored, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set signal handlers
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _require_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError, TypeError, ValueError) as error:  # TypeError: a name that IDNA can't encode
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(
                f"{host}:{port} can't be listened on: {reason}", "choose another port: --port 8001"
            ) from error


def _die_with(parent: int) -> None:
    """Runs in the child: when its parent is killed, the child gets SIGTERM (Linux); it ends if that has happened."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _alive(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
