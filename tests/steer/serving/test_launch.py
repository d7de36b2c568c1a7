"""Starting a server and ending it, with a stand-in for vLLM that needs no model."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from steer.serving import launch
from steer.serving.address import answers
from vectors.errors import OutputError, UsageError
from vectors.events import Event

# Answers /health after a while, with a child of its own; what it does on being asked to end is in BEHAVIOUR.
FAKE = """
import http.server, os, signal, socket, socketserver, ssl, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("CHILD", child.pid, flush=True)
print("INFO non-default args", flush=True)
behaviour = os.environ["BEHAVIOUR"]
if behaviour == "dies":
    print("ValueError: the model is too large", flush=True)
    sys.exit(3)
if behaviour == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(0.3)
print("INFO Starting vLLM server", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        if behaviour == "ends":
            os._exit(4)
    def log_message(self, *words): pass
    def address_string(self): return ""
port = int(sys.argv[sys.argv.index("--port") + 1])
class Unix(http.server.HTTPServer):
    address_family = socket.AF_UNIX
    def server_bind(self): socketserver.TCPServer.server_bind(self)
path = sys.argv[sys.argv.index("--uds") + 1] if "--uds" in sys.argv else None
server = Unix(path, Handler) if path else http.server.HTTPServer(("127.0.0.1", port), Handler)
if "--ssl-certfile" in sys.argv:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate = sys.argv[sys.argv.index("--ssl-certfile") + 1]
    context.load_cert_chain(certificate, sys.argv[sys.argv.index("--ssl-keyfile") + 1])
    if "--ssl-cert-reqs" in sys.argv:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in's script, which takes the place of vLLM's command."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    started = launch.subprocess.Popen

    def popen(command: list[str], **more: Any) -> Any:
        return started([sys.executable, str(script), *command[5:]], **more)

    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(launch.subprocess, "Popen", popen)
    monkeypatch.setattr(launch, "GRACE", (0.5, 0.5, 5.0))
    return script


def child(log: Path) -> int:
    """The process that the stand-in started."""
    return int(next(line for line in log.read_text().splitlines() if line.startswith("CHILD")).split()[1])


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            if " Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def serve(folder: Path, port: int, behaviour: str, **more: Any) -> Any:
    return launch.served(
        folder, {}, name="m", port=port, log=folder / "log", environment={"BEHAVIOUR": behaviour}, **more
    )


def test_a_proxy_in_the_environment_is_not_asked_for_the_server(
    fake: Path, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serve(tmp_path, port, "polite") as server:
        assert answers(server.address)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags for a certificate that nobody has signed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificate")
    key, made = str(folder / "key.pem"), str(folder / "certificate.pem")
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=other"]
    subprocess.run(["openssl", "req", "-x509", *kind, "-keyout", key, "-out", made], check=True, capture_output=True)
    return ["--ssl-keyfile", key, "--ssl-certfile", made]


@pytest.mark.parametrize("clients", [[], ["--ssl-cert-reqs", "2"]], ids=["any client", "clients with certificates"])
def test_a_server_that_speaks_tls_is_seen_to_answer(
    fake: Path, tmp_path: Path, port: int, certificate: list[str], clients: list[str]
) -> None:
    with serve(tmp_path, port, "polite", flags=[*certificate, *clients]) as server:
        assert (server.url, str(server.address)) == (f"https://127.0.0.1:{port}",) * 2
        assert answers(server.address)
        assert not answers(server.address._replace(tls=False))


def test_a_server_on_a_unix_socket_is_seen_to_answer(fake: Path, tmp_path: Path, port: int) -> None:
    with (
        tempfile.TemporaryDirectory() as short,
        socket.socket() as taken,  # a socket of this port is none of its business
        serve(tmp_path, port, "polite", flags=["--uds", f"{short}/s"]) as server,
    ):
        taken.bind(("127.0.0.1", port))
        assert (str(server.address), server.url) == (f"unix:{short}/s", "http://localhost")
        assert answers(server.address)
        assert not answers(server.address._replace(path=f"{short}/other"))


def test_flags_with_which_it_would_wait_forever_are_refused_together(fake: Path, tmp_path: Path, port: int) -> None:
    with (
        pytest.raises(UsageError) as caught,
        serve(tmp_path, port, "polite", flags=["--port", "9", "--host=::", "--headless"]),
    ):
        pass
    assert len(caught.value.problems) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("behaviour", ["polite", "deaf"])
def test_whatever_happens_inside_nothing_is_left(behaviour: str, fake: Path, tmp_path: Path, port: int) -> None:
    stages: list[str] = []

    def use() -> None:
        with serve(tmp_path, port, behaviour, on_event=lambda event: stages.append(event.stage)) as server:
            assert answers(server.address)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert stages[-1] in ("opening the port", "reading the model's configuration")
    assert gone(child(tmp_path / "log"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_api_key_is_in_the_environment_of_the_process_and_not_among_its_arguments(
    fake: Path, tmp_path: Path, port: int
) -> None:
    with serve(tmp_path, port, "polite", api_keys=["secret-key"]) as server:
        process = Path(f"/proc/{server.process.pid}")
        assert b"secret-key" not in (process / "cmdline").read_bytes()
        assert b'STEER_API_KEYS=["secret-key"]' in (process / "environ").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_server_that_dies_while_it_starts_says_why_and_leaves_nothing(fake: Path, tmp_path: Path, port: int) -> None:
    with pytest.raises(launch.ServerError) as caught, serve(tmp_path, port, "dies"):
        pass
    problems = ("the server did not start, with status 3", "ValueError: the model is too large")
    assert caught.value.problems == problems
    assert str(tmp_path / "log") in caught.value.hint
    assert gone(child(tmp_path / "log"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_server_that_ends_by_itself_is_an_error(fake: Path, tmp_path: Path, port: int) -> None:
    with pytest.raises(launch.ServerError, match="has ended, with status 4"), serve(tmp_path, port, "ends") as server:
        server.wait()
    assert gone(child(tmp_path / "log"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_while_it_ends_does_not_interrupt_the_ending(fake: Path, tmp_path: Path, port: int) -> None:
    with serve(tmp_path, port, "deaf") as server:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.signal(signal.SIGALRM, before)
    assert server.process.poll() is not None
    assert gone(child(tmp_path / "log"))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child of its parent's death")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_server_ends_with_its_launcher_also_when_that_is_killed_while_it_starts_the_server(when: str) -> None:
    """`before` or `after` the child has asked to be told; a pipe that both hold shows that both have ended."""
    script = (
        "import os, signal, sys, time; from steer.serving import launch\n"
        "parent, before = os.getpid(), sys.argv[1] == 'before'\n"
        "if not os.fork():\n"
        "    while before and os.getppid() == parent: time.sleep(0.01)\n"
        "    launch._die_with(parent); print('asked', flush=True); time.sleep(60)\n"
        "if not before: time.sleep(1)\n"
        "os.kill(parent, signal.SIGKILL)"
    )
    process = subprocess.run([sys.executable, "-c", script, when], capture_output=True, timeout=30, check=False)
    assert process.returncode == -signal.SIGKILL
    assert process.stdout.split() == ([b"asked"] if when == "after" else [])


def serve_without_log(folder: Path, port: int, behaviour: str) -> Any:
    return launch.served(folder, {}, name="m", port=port, environment={"BEHAVIOUR": behaviour})


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, empty."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(launch.tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="sends signals")
@pytest.mark.parametrize("ending", ["orderly", "SIGTERM", "error"])
def test_the_temporary_folder_is_gone_however_a_server_ends(
    ending: str, fake: Path, temporary: Path, tmp_path: Path, port: int
) -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as `steer serve` does
    try:
        with (
            contextlib.suppress(SystemExit, ZeroDivisionError),
            serve_without_log(tmp_path, port, "polite") as server,
        ):
            assert list(temporary.iterdir()) != []
            if ending == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            if ending == "error":
                raise ZeroDivisionError
    finally:
        signal.signal(signal.SIGTERM, before)
    assert server.process.poll() is not None
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_of_a_server_that_dies_the_log_alone_is_left(fake: Path, temporary: Path, tmp_path: Path, port: int) -> None:
    with pytest.raises(launch.ServerError) as caught, serve_without_log(tmp_path, port, "dies"):
        pass
    (log,) = temporary.iterdir()
    assert str(log) in caught.value.hint
    assert "the model is too large" in log.read_text()


def test_a_start_that_is_interrupted_shows_the_end_of_the_log_which_goes_with_its_folder(
    fake: Path, temporary: Path, tmp_path: Path, port: int
) -> None:
    messages: list[str] = []

    def interrupt(event: Event) -> None:
        messages.extend([event.message] if event.message else [])
        if event.stage == "reading the model's configuration":
            raise KeyboardInterrupt

    environment = {"BEHAVIOUR": "deaf"}
    with (
        pytest.raises(KeyboardInterrupt),
        launch.served(tmp_path, {}, name="m", port=port, environment=environment, on_event=interrupt),
    ):
        pass
    assert "INFO non-default args" in messages[0]
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_server_holds_the_lock_of_its_folder_too(fake: Path, temporary: Path, tmp_path: Path, port: int) -> None:
    with serve_without_log(tmp_path, port, "polite") as server:
        (lock,) = temporary.glob("*.steer-lock")
        opened = [
            os.readlink(entry) for entry in Path(f"/proc/{server.process.pid}/fd").iterdir() if entry.is_symlink()
        ]
        assert str(lock) in opened


def test_the_folder_of_a_killed_server_is_removed_by_the_next_one(
    fake: Path, temporary: Path, tmp_path: Path, port: int
) -> None:
    script = (
        "import os, pathlib, signal; from vectors.storage.locks import temporary_folder\n"
        f"with temporary_folder(pathlib.Path({str(temporary / 'steer-serve')!r})) as folder:\n"
        "    (folder / 'vllm.log').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", script])  # subprocess is the stand-in's here
    left = set(temporary.iterdir())
    assert left
    with serve_without_log(tmp_path, port, "polite"):
        assert not left & set(temporary.iterdir())


def test_a_port_in_use_or_a_log_that_cannot_be_written_is_said_before_anything_starts(
    fake: Path, tmp_path: Path, port: int
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(UsageError, match=f"127.0.0.1:{port} can't be listened on"), serve(tmp_path, port, "polite"):
            pass
    with (
        pytest.raises(OutputError, match="can't be written"),
        launch.served(tmp_path, {}, name="m", port=port, log=tmp_path / "no" / "log"),
    ):
        pass
    for host in ("no host", "é" * 80):
        with pytest.raises(UsageError, match="can't be listened on"), launch.served(tmp_path, {}, name="m", host=host):
            pass


def test_without_vllm_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="vLLM is not installed"), launch.served(tmp_path, {}, name="m"):
        pass


def test_other_plugins_stay_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "theirs,steer")
    found = launch._environment(tmp_path / "steer.json")
    assert (found["VLLM_PLUGINS"], found["STEER_CONFIG"]) == ("theirs,steer", str(tmp_path / "steer.json"))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    if launch.cpu_build():
        assert launch._environment(tmp_path)["VLLM_CPU_KVCACHE_SPACE"] == "3"


LOG = """INFO 11-25 13:57:35 [x.py:1] all is well
(APIServer pid=4429) WARNING 11-25 13:57:35 [system_utils.py:255] can cause errors like `OSError: [Errno 24] Too many`.
(APIServer pid=4429) Traceback (most recent call last):
(APIServer pid=4429)   File "x.py", line 1, in f
(APIServer pid=4429) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
(APIServer pid=4429)   Value error, max_model_len is too large [type=value_error]
(APIServer pid=4429)     For further information visit a page
"""
ENGINE = """(EngineCore pid=7) ERROR 11-25 13:57:35 [core.py:9] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-25 13:57:35 [core.py:9] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-25 13:57:35 [core.py:9] ValueError: steer: no such block
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            LOG,
            [
                "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
                "Value error, max_model_len is too large [type=value_error]",
                "For further information visit a page",
            ],
        ),
        (ENGINE, ["ValueError: steer: no such block"]),
        (
            "vllm_command.py: error: unrecognized arguments: --x",
            ["vllm_command.py: error: unrecognized arguments: --x"],
        ),
        ("one\n\ntwo\n", ["one", "two"]),
    ],
)
def test_the_reason_is_read_from_the_log(log: str, reason: list[str]) -> None:
    assert launch._reason(log.splitlines()) == reason


def test_a_package_that_the_models_code_lacks_is_named_with_the_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.txt"
    imported = """WARNING [activation.py:1] CUDA-fused xIELU not available (No module named 'xielu')
(APIServer pid=6) ERROR 11-27 12:16:32 [registry.py:1120] ModuleNotFoundError: No module named 'torchvision.transforms'
"""
    inspected = "  Value error, Model architectures ['Qwen3_5ForCausalLM'] failed to be inspected.\n"
    failed = "(APIServer pid=6) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
    log.write_text(imported + failed + f"(APIServer pid=6) {inspected}")
    ended = subprocess.Popen(["false"])
    ended.wait()
    server = launch.Server.__new__(launch.Server)
    server.log, server.process = log, ended
    monkeypatch.setattr(launch, "cpu_build", lambda: True)
    error = server.death("has ended")
    assert error.problems[-1] == "vLLM's code for this model imports torchvision, which is not installed"
    command = "pip install torchvision --index-url https://download.pytorch.org/whl/cpu"
    assert error.hint == f"{command}; the whole log is {log}"
    log.write_text(imported + LOG)
    assert "torchvision" not in str(server.death("has ended"))
