"""Locks: what another machine may hold, file systems without locks, long names, and errors of other files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vectors.errors import OutputError
from vectors.storage import machines
from vectors.storage.files import new_file, write_atomically
from vectors.storage.folders import new_folder, work_folder
from vectors.storage.locks import (
    Busy,
    locked,
    remove_leftovers,
    remove_unfinished_of_this_process,
    temporary_file,
    temporary_folder,
    temporary_folder_and_lock,
)

RUN = {"model": "sha256:1"}
WEEK = machines.DAYS * 86400


@pytest.fixture
def other_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which another machine, whose locks are not seen here, left a file, a folder and a lock."""
    before = machines.tag()
    monkeypatch.setattr(machines, "tag", lambda: "0123abcd")
    monkeypatch.setattr(machines, "name", lambda: "node-7")
    handle, _ = temporary_file(tmp_path / "file")
    os.close(handle)
    (tmp_path / ".folder.abcdefgh.0123abcd.steer-tmp").mkdir()
    (tmp_path / ".out.work.steer-lock").write_text("0123abcd node-7\n")
    monkeypatch.setattr(machines, "tag", lambda: before)
    monkeypatch.setattr(machines, "shows_locks", lambda _path: False)
    return tmp_path


def test_what_another_machine_may_be_writing_stays(other_machine: Path) -> None:
    before = sorted(os.listdir(other_machine))
    write_atomically(other_machine / "a", b"")
    assert sorted(os.listdir(other_machine)) == sorted([*before, "a"])


def test_after_a_week_it_is_removed(other_machine: Path) -> None:
    for name in os.listdir(other_machine):
        os.utime(other_machine / name, (time.time() - WEEK - 60,) * 2)
    write_atomically(other_machine / "a", b"")
    assert os.listdir(other_machine) == ["a"]


def test_where_locks_are_seen_by_all_machines_it_is_removed_at_once(
    other_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "shows_locks", lambda _path: True)
    write_atomically(other_machine / "a", b"")
    assert os.listdir(other_machine) == ["a"]


def test_the_work_folder_of_another_machine_is_refused_with_its_name(other_machine: Path) -> None:
    with (
        pytest.raises(OutputError, match="it is of the machine node-7") as caught,
        work_folder(other_machine / "out", RUN),
    ):
        raise AssertionError("entered")
    assert caught.value.hint == f"if nothing writes there any more: rm {other_machine}/.out.work.steer-lock"
    (other_machine / ".out.work.steer-lock").unlink()
    with work_folder(other_machine / "out", RUN):
        pass


def test_the_temporary_names_of_earlier_versions_are_removed(other_machine: Path) -> None:
    (other_machine / ".out.abcdefgh.steer-tmp").write_bytes(b"")
    remove_leftovers(other_machine)
    assert not (other_machine / ".out.abcdefgh.steer-tmp").exists()


@pytest.mark.parametrize(
    ("kind", "options", "shows"),
    [
        ("ext4", [], True),
        ("overlay", [], True),
        ("nfs4", ["rw", "local_lock=none"], True),
        ("nfs", ["rw", "local_lock=flock"], False),
        ("nfs", ["rw", "local_lock=all", "nolock"], False),
        ("lustre", ["flock"], True),
        ("lustre", ["localflock"], False),
        ("cifs", [], False),
        ("9p", [], False),
        ("fuse.sshfs", [], False),
        ("", [""], False),
    ],
)
def test_file_systems_that_show_locks_to_every_machine_are_known(
    monkeypatch: pytest.MonkeyPatch, kind: str, options: list[str], shows: bool
) -> None:
    monkeypatch.setattr(machines, "_mount", lambda _path: (kind, options))
    assert machines.shows_locks("/x") is shows


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_file_system_of_a_path_is_that_of_its_mount() -> None:
    assert machines._mount("/proc/self/maps")[0] == "proc"
    assert machines._mount("/")[0]


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_handle: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("without_locks")
def test_without_locks_everything_counts_as_locked(tmp_path: Path) -> None:
    (tmp_path / ".file.abcdefgh.steer-tmp").write_bytes(b"")
    (tmp_path / ".folder.abcdefgh.steer-tmp").mkdir()
    with new_folder(tmp_path / "out"):
        pass
    write_atomically(tmp_path / "a", b"")
    left = [".file.abcdefgh.steer-tmp", ".folder.abcdefgh.steer-tmp"]
    assert sorted(os.listdir(tmp_path)) == sorted(["a", "out", *left])


@pytest.mark.usefixtures("without_locks")
def test_without_locks_two_runs_do_not_share_a_work_folder(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out", RUN):
        with pytest.raises(OutputError, match="has no locks") as caught, work_folder(tmp_path / "out", RUN):
            raise AssertionError("entered")
        assert "rm " in caught.value.hint
    assert os.listdir(tmp_path) == []
    with work_folder(tmp_path / "out", RUN):
        pass


@pytest.mark.parametrize("length", [200, 201, 243, 244, 255])
def test_outputs_with_long_names_are_written(tmp_path: Path, length: int) -> None:
    name = "ä" * (length // 2) + "x" * (length % 2)
    assert len(os.fsencode(name)) == length
    with locked(tmp_path / name):
        pass
    with work_folder(tmp_path / name, RUN, becomes_output=True) as folder:
        (folder / "a").write_bytes(b"")
    assert os.listdir(tmp_path) == [name]
    (tmp_path / "other").mkdir()
    with new_folder(tmp_path / "other" / name):
        pass
    with new_file(tmp_path / "other" / ("f" + name[1:])) as file:
        file.write(b"")
    assert len(os.listdir(tmp_path / "other")) == 2


def test_long_names_with_the_same_beginning_have_different_work_folders(tmp_path: Path) -> None:
    one, two = tmp_path / ("x" * 250 + "1"), tmp_path / ("x" * 250 + "2")
    with work_folder(one, RUN) as first, work_folder(two, RUN) as second:
        assert first != second


def test_an_error_of_another_file_is_not_named_after_the_output(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"elsewhere/x can't be written"), new_folder(tmp_path / "out"):
        write_atomically(tmp_path / "elsewhere" / "x", b"")
    with pytest.raises(OutputError, match=r"input can't be used: No such file"), work_folder(tmp_path / "out", RUN):
        (tmp_path / "input").open()
    with (
        pytest.raises(OutputError, match=r"out can't be written: No such file"),
        new_folder(tmp_path / "out") as folder,
    ):
        write_atomically(folder / "none" / "x", b"")


def test_a_child_that_inherits_the_lock_of_a_folder_holds_it_when_its_parent_has_died(tmp_path: Path) -> None:
    script = """
import os, subprocess, sys
from pathlib import Path
from typing import Any
from vectors.storage.locks import temporary_folder_and_lock
with temporary_folder_and_lock(Path(sys.argv[1])) as (folder, lock):
    child = subprocess.Popen(["sleep", "60"], pass_fds=(lock,), stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    os._exit(0)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "x")]
    child = int(subprocess.run(command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, check=True).stdout)
    try:
        remove_leftovers(tmp_path)
        assert len(os.listdir(tmp_path)) == 2
    finally:
        os.kill(child, 9)
    for _ in range(100):
        remove_leftovers(tmp_path)
        if not os.listdir(tmp_path):
            break
        time.sleep(0.05)
    assert os.listdir(tmp_path) == []


def test_the_lock_of_a_folder_is_held_by_this_process_alone_by_default(tmp_path: Path) -> None:
    with temporary_folder_and_lock(tmp_path / "x") as (_, lock):
        assert not os.get_inheritable(lock)


class Ended(BaseException):
    """What a handler of SIGTERM raises."""


@pytest.fixture
def sigterm_raises() -> Iterator[None]:
    def end(_signal: int, _frame: object) -> None:
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm_raises")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the file that fdopen did not return
@pytest.mark.parametrize("call", [(tempfile, "mkstemp"), (os, "open"), (os, "fdopen"), (os, "replace"), (os, "mkdir")])
def test_a_signal_at_the_very_moment_at_which_something_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: tuple[object, str]
) -> None:
    original = getattr(*call)

    def interrupted(*arguments: object, **options: object) -> object:
        result = original(*arguments, **options)
        if str(tmp_path) in f"{arguments} {options} {result}" or call[1] == "fdopen":
            signal.raise_signal(signal.SIGTERM)
        return result

    def make() -> None:
        write_atomically(tmp_path / "file", b"")
        with new_folder(tmp_path / "folder"), work_folder(tmp_path / "out", RUN):
            pass

    monkeypatch.setattr(*call, interrupted)
    with contextlib.suppress(Ended):
        make()
    monkeypatch.undo()
    remove_unfinished_of_this_process()  # as the command line does
    assert [name for name in os.listdir(tmp_path) if name[0] == "."] == []


@pytest.mark.usefixtures("sigterm_raises")
@pytest.mark.parametrize("call", ["unlink", "rmdir"])
@pytest.mark.parametrize("context", [temporary_folder, new_folder], ids=lambda context: context.__name__)
def test_a_signal_while_a_folder_is_removed_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, context: Any
) -> None:
    original, signals = getattr(os, call), iter([signal.SIGTERM])

    def interrupted(path: Any, **options: Any) -> None:
        for number in signals:
            signal.raise_signal(number)
        original(path, **options)

    def fail() -> None:
        with context(tmp_path / "folder") as folder:
            for name in ("one", "two"):
                (folder / name).touch()
            monkeypatch.setattr(os, call, interrupted)
            raise ZeroDivisionError

    with pytest.raises(Ended):
        fail()
    assert list(signals) == []
    monkeypatch.undo()
    remove_unfinished_of_this_process()  # as the command line does
    assert os.listdir(tmp_path) == []


def test_what_other_processes_are_writing_is_not_removed_with_what_this_one_has_left(tmp_path: Path) -> None:
    with locked(tmp_path / "held"):
        pass
    script = "import sys; from pathlib import Path; from vectors.storage.locks import *\n"
    script += "with locked(Path(sys.argv[1])): print('there', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path / "held")]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[3], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        with pytest.raises(Busy), locked(tmp_path / "held"):
            raise AssertionError("entered")
        remove_unfinished_of_this_process()
        assert os.listdir(tmp_path) == ["held.steer-lock"]
        process.communicate(b"")
