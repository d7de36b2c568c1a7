"""Bytes on disk: one text of a JSON value, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vectors.errors import OutputError
from vectors.storage.files import (
    canonical_json,
    digest_bytes,
    digest_json,
    finite,
    permissions,
    require_distinct,
    require_writable,
    write_atomically,
)

REPOSITORY = Path(__file__).parents[3]


def test_canonical_json_has_sorted_keys_no_spaces_and_plain_unicode() -> None:
    assert canonical_json({"b": [1, 2.5, None, True], "a": {"é": "深"}}) == '{"a":{"é":"深"},"b":[1,2.5,null,true]}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [-float("inf")]])
def test_canonical_json_has_no_nan_and_no_infinity(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": value})


@given(st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False) | st.text(), max_size=6))
@settings(database=None, derandomize=True, deadline=None, max_examples=50)
def test_the_order_of_keys_does_not_change_a_digest(value: dict[str, Any]) -> None:
    assert digest_json(value) == digest_json(dict(reversed(value.items())))


def test_a_digest_is_the_sha256_of_the_parts_one_after_the_other() -> None:
    assert digest_bytes(b"ab", b"", b"c") == digest_bytes(b"abc") == "sha256:" + hashlib.sha256(b"abc").hexdigest()


def test_a_new_file_has_the_content_and_the_permissions_of_a_plain_one(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"content")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_permissions_are_what_is_requested_less_the_umask(mask: int) -> None:
    before = os.umask(mask)
    try:
        assert permissions() == 0o666 & ~mask
        assert permissions(0o777) == 0o777 & ~mask
        assert os.umask(mask) == mask
    finally:
        os.umask(before)


def test_an_old_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old and longer")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["fsync", "chmod", "replace", "fdopen"])
def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    original = os.fdopen

    def full(*arguments: Any, **_: Any) -> None:
        if call == "fdopen":
            original(arguments[0], "wb").close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match="a can't be written: No space left on device") as caught:
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert "free some space" in caught.value.hint
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_device_that_is_really_full_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write itself fails, part of the way."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    script = """
import resource, sys
from pathlib import Path
from vectors.errors import OutputError
from vectors.storage.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_atomically(Path(sys.argv[1]), b"n" * 1_000_000)
except OutputError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{path} can't be written: File too large\n"
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_an_interrupt_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path: Path, stage: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    script = f"""
import os, sys, time
from pathlib import Path
from vectors.storage.files import write_atomically
def stop(*_):
    print("there", flush=True)
    time.sleep(60)
os.{stage} = stop
write_atomically(Path(sys.argv[1]), b"new" * 1000)
"""
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert path.read_bytes() == b"old"
    left = [name for name in os.listdir(tmp_path) if name != "a"]
    assert all(name.startswith(".a.") for name in left)  # hidden, so that nobody takes it for a vector
    write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_a_reader_never_sees_a_part_while_files_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a"
    whole = {bytes([i]) * 200_000 for i in (1, 2)}
    write_atomically(path, min(whole))
    script = """
import sys
from pathlib import Path
from vectors.storage.files import write_atomically
for i in range(60):
    write_atomically(Path(sys.argv[1]), bytes([1 + i % 2]) * 200_000)
"""
    seen = set()
    with subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=REPOSITORY) as process:
        until = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < until:
            seen.add(path.read_bytes())
    assert process.returncode == 0
    assert seen <= whole


def test_a_path_that_can_become_a_file_passes_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    require_writable(tmp_path / "new")
    require_writable(tmp_path / "old")
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def test_a_bare_name_is_a_file_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_writable(Path("a"))
    write_atomically(Path("a"), b"content")
    assert (tmp_path / "a").read_bytes() == b"content"


def test_a_folder_is_no_output_and_the_hint_names_a_file_in_it(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder") as caught:
        require_writable(tmp_path)
    assert str(tmp_path / "vector.safetensors") in caught.value.hint


def test_a_folder_that_does_not_exist_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"the folder .*none/deep of the output a does not exist") as caught:
        require_writable(tmp_path / "none" / "deep" / "a")
    assert caught.value.hint.endswith(f"mkdir -p {tmp_path}/none/deep")


def test_a_file_in_the_place_of_the_folder_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="can't be written: Not a directory"):
        require_writable(tmp_path / "file" / "a")


@pytest.mark.parametrize("write", [require_writable, lambda path: write_atomically(path, b"")], ids=["check", "write"])
def test_a_name_that_is_too_long_is_an_output_error(tmp_path: Path, write: Any) -> None:
    with pytest.raises(OutputError, match="File name too long"):
        write(tmp_path / ("a" * 300))


def test_a_folder_that_may_not_be_written_is_an_output_error(tmp_path: Path) -> None:
    """Asked as nobody where this runs as root, whom no permission stops."""
    for name, mode in (("readonly", 0o555), ("closed", 0o000)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    script = """
import os, sys
from pathlib import Path
from vectors.errors import OutputError
from vectors.storage.files import require_distinct, require_writable, write_atomically
os.chdir(sys.argv[1])
if os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
for name in ("readonly/a", "closed/a", "closed/deep/a"):
    for write in (require_writable, lambda path: write_atomically(path, b"")):
        try:
            write(Path(name))
        except OutputError as error:
            print(type(error).__name__, name, error.hint)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 6
    (tmp_path / "closed").chmod(0o755)


@pytest.mark.parametrize("kind", ["pipe", "device", "read-only", "circle"])
def test_what_no_one_means_to_replace_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/null")
    elif kind == "circle":
        path.symlink_to(path)
    else:
        path.write_bytes(b"old")
        path.chmod(0o444)
    words = {"read-only": "is read-only", "circle": "leads back to itself"}.get(kind, "not an ordinary file")
    with pytest.raises(OutputError, match=words):
        require_writable(path)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path, there: bool) -> None:
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "target", tmp_path / "link"
    if there:
        target.write_bytes(b"old")
    link.symlink_to(target)
    require_writable(link)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_an_output_that_is_an_input_is_refused_by_whatever_name(tmp_path: Path) -> None:
    source, link = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"")
    link.symlink_to(source)
    require_distinct(tmp_path / "c", {"--pos": source, "--neg": None, "--pairs": ["a", "list"]})
    with pytest.raises(OutputError, match="is the file given as --pos"):
        require_distinct(link, {"--pos": str(source)})


def test_what_json_lacks_becomes_null() -> None:
    assert finite({"loss": [1.5, float("inf"), float("nan")], "n": 3}) == {"loss": [1.5, None, None], "n": 3}
