"""Folders that appear whole or not at all, work that is resumed, and what killed processes leave."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vectors.errors import OutputError, SteerError, UsageError
from vectors.storage.files import new_file, write_atomically
from vectors.storage.folders import new_folder, remove_unfinished, require_free_output, work_folder

REPOSITORY = Path(__file__).parents[3]
RUN = {"model": "sha256:1", "steps": 3}
WRITERS = """
import os, sys, time
from pathlib import Path
from vectors.errors import SteerError
from vectors.storage.files import new_file, write_atomically
from vectors.storage.folders import new_folder, work_folder

def stop(*_):
    print("there", flush=True)
    time.sleep(60)

def in_folder(out):
    with new_folder(out) as folder:
        for i in range(3):
            write_atomically(folder / f"{i}.bin", b"x" * 100_000)

def in_work(out):
    with work_folder(out, {"model": "sha256:1", "steps": 3}, becomes_output=True) as folder:
        for i in range(3):
            write_atomically(folder / f"{i}.bin", b"x" * 100_000)

def in_file(out):
    with new_file(out) as file:
        for i in range(3):
            file.write(b"x" * 100_000)

WRITE = {"folder": in_folder, "work": in_work, "file": in_file}
"""


def child(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITERS + script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def killed(script: str, *arguments: object) -> None:
    """Run a script that prints a line, and kill it there."""
    with child(script, *arguments) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGKILL)


def stop_half_way(folder: Path) -> None:
    (folder / "half").write_bytes(b"half")
    raise KeyboardInterrupt


def content(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def test_a_new_folder_appears_with_everything_in_it_and_nothing_beside_it(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_bytes(b"a")
        assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["a"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write(context: Callable[[Path], object]) -> None:
        with pytest.raises(error), context(tmp_path / "out"):  # type: ignore[attr-defined]
            raise error

    write(new_folder)
    write(new_file)
    assert os.listdir(tmp_path) == []


def test_an_output_that_exists_or_can_not_be_made_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="link exists"), new_folder(tmp_path / "link"):
        raise AssertionError("entered")
    with pytest.raises(OutputError, match="does not exist") as caught:
        require_free_output(tmp_path / "none" / "out")
    assert caught.value.hint == f"mkdir -p {tmp_path}/none"
    with pytest.raises(OutputError, match=r"takes 1000000000\.00 GB"):
        require_free_output(tmp_path / "out", 10**18)
    with pytest.raises(OutputError, match="/proc can't be written") as caught:
        require_free_output(Path("/proc/out"))
    assert "takes" not in str(caught.value)


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists now"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["folder", "work", "file"])
@pytest.mark.parametrize("call", ["os.fsync", "os.rename", "os.replace", "os.chmod", "Path.chmod"])
def test_a_kill_leaves_no_final_name_and_the_next_run_no_leftover(tmp_path: Path, kind: str, call: str) -> None:
    if (kind, call) in {("file", "os.rename"), ("file", "Path.chmod"), ("work", "Path.chmod")}:
        pytest.skip("this kind makes no such call")
    out = tmp_path / "out"
    killed(f"{call} = stop\nWRITE[sys.argv[1]](Path(sys.argv[2]))", kind, out)
    assert not out.exists()
    with child("WRITE[sys.argv[1]](Path(sys.argv[2]))", kind, out) as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert content(out) >= 300_000
    assert os.listdir(tmp_path) == ["out"]
    if out.is_dir():
        assert {name for name in os.listdir(out) if name != "run.json"} == {"0.bin", "1.bin", "2.bin"}


@pytest.mark.parametrize("left_by", ["folder", "file"])
@pytest.mark.parametrize("writer", ["new_folder", "work_folder", "new_file", "write_atomically"])
def test_any_writer_removes_what_any_other_left(tmp_path: Path, left_by: str, writer: str) -> None:
    killed("os.fsync = stop\nWRITE[sys.argv[1]](Path(sys.argv[2]))", left_by, tmp_path / "out")
    assert os.listdir(tmp_path) != []
    other = tmp_path / "other"
    if writer == "new_folder":
        with new_folder(other):
            pass
    elif writer == "work_folder":
        with work_folder(other, RUN, becomes_output=True):
            pass
    elif writer == "new_file":
        with new_file(other):
            pass
    else:
        write_atomically(other, b"")
    assert os.listdir(tmp_path) == ["other"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_a_living_process_writes_is_no_leftover(tmp_path: Path, kind: str) -> None:
    script = """
write, again = WRITE[sys.argv[1]], os.fsync
def once(handle):
    os.fsync = again
    print("there", flush=True)
    sys.stdin.readline()
    again(handle)
os.fsync = once
write(Path(sys.argv[2]))
"""
    command = [sys.executable, "-c", WRITERS + script, kind, str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        write_atomically(tmp_path / "other", b"")
        process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert content(tmp_path / "out") == 300_000
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_only_what_was_made_here_is_removed_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").write_bytes(b"")
    foreign = [".out.notes.partial", ".out.abcdefgh.tmp", ".out.ABCDEFGH.steer-tmp", "out.abcdefgh.steer-tmp"]
    for name in foreign:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".out.abcdefgh.steer-tmp").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / ".out.abcdefgi.steer-tmp")
    before = sorted(os.listdir(tmp_path))
    write_atomically(tmp_path / "a", b"")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "a"])
    assert os.listdir(tmp_path / "target") == ["precious"]


@pytest.mark.parametrize("kind", ["folder", "work", "file"])
def test_two_processes_at_once_give_right_results_and_clear_refusals(tmp_path: Path, kind: str) -> None:
    script = """
for i in range(8):
    try:
        WRITE[sys.argv[1]](Path(sys.argv[2]) / f"out-{i}")
    except SteerError as error:
        print(error)
"""
    both = [child(script, kind, tmp_path) for _ in range(2)]
    for process in both:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        assert all(re.search("exists|another process|Directory not empty", line) for line in stdout.splitlines())
    assert sorted(os.listdir(tmp_path)) == [f"out-{i}" for i in range(8)]
    for i in range(8):
        assert content(tmp_path / f"out-{i}") >= 300_000


@pytest.mark.parametrize("kind", ["folder", "work", "file"])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    script = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    WRITE[sys.argv[1]](Path(sys.argv[2]))
except SteerError as error:
    print(error.hint)
"""
    with child(script, kind, tmp_path / "out") as process:
        stdout, stderr = process.communicate(timeout=60)
    assert "free some space" in stdout, stderr
    assert [name for name in os.listdir(tmp_path) if name != ".out.work"] == []


def test_interrupted_work_goes_on_and_ends_without_a_trace(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), work_folder(out, RUN) as folder:
        stop_half_way(folder)
    assert os.listdir(tmp_path) == [".out.work"]
    with work_folder(out, RUN) as folder:
        assert (folder / "half").read_bytes() == b"half"
    assert os.listdir(tmp_path) == []


def test_the_work_of_another_run_is_refused_and_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), work_folder(out, RUN):
        raise KeyboardInterrupt
    with pytest.raises(UsageError, match="which differs in steps") as caught, work_folder(out, RUN | {"steps": 4}):
        raise AssertionError("entered")
    assert "rm -r" in caught.value.hint
    assert json.loads((tmp_path / ".out.work" / "run.json").read_text()) == RUN


def test_work_that_is_not_worth_keeping_is_removed(tmp_path: Path) -> None:
    def keep(folder: Path, error: BaseException) -> bool:
        return not isinstance(error, SteerError) and (folder / "half").exists()

    for error in (UsageError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)), work_folder(tmp_path / "out", RUN, keep=keep):
            raise error
        assert os.listdir(tmp_path) == []


def test_a_link_in_the_place_of_the_work_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").write_bytes(b"")
    (tmp_path / ".out.work").symlink_to(tmp_path / "target")
    with pytest.raises(OutputError, match="not a folder that this user can write"), work_folder(tmp_path / "out", RUN):
        raise AssertionError("entered")
    assert os.listdir(tmp_path / "target") == ["precious"]


def test_a_link_within_the_work_folder_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / ".out.work").mkdir()
    (tmp_path / ".out.work" / "a").symlink_to(tmp_path / "precious")
    with work_folder(tmp_path / "out", RUN, becomes_output=True) as folder:
        write_atomically(folder / "a", b"new")
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_link_in_the_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".out.work.steer-lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError), work_folder(tmp_path / "out", RUN):
        raise AssertionError("entered")
    assert not (tmp_path / "precious").exists()


def test_unfinished_work_is_removed_by_its_exact_name(tmp_path: Path) -> None:
    mine, others = ".m.0123456789abcdef.partial", [".m.v2.0123456789abcdef.partial", ".m.notes.partial"]
    for name in (mine, *others):
        (tmp_path / name).mkdir()
    remove_unfinished(tmp_path / "m", r"[0-9a-f]{16}\.partial")
    assert sorted(os.listdir(tmp_path)) == sorted(others)
