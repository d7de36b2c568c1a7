"""The journal: rows that outlive a killed process, full disks, and what two processes do in one folder."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from steer.experiments.storage.journal import Journal, Row, abandoned


def row(number: int, size: int = 10) -> Row:
    return "events", {"id": str(number), "reason": "x" * size}


def ids(rows: list[Row]) -> list[int]:
    return [int(values["id"]) for _, values in rows]


def drained(journal: Journal, most: int = 7) -> list[int]:
    found: list[int] = []
    while True:
        rows, size = journal.read(most)
        if not rows:
            return found
        found += ids(rows)
        journal.done(len(rows), size)


def test_a_file_is_there_for_others_only_once_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another process that opens the log at that moment takes it for one that was left, and removes it."""
    found: list[list[tuple[list[Row], int]]] = []

    def locked(handle: int, how: int) -> None:
        monkeypatch.undo()
        found.append(list(abandoned(tmp_path)))
        fcntl.flock(handle, how)

    monkeypatch.setattr("steer.experiments.storage.journal.fcntl.flock", locked)
    journal = Journal(tmp_path)
    assert journal.append(row(1))
    assert found == [[]]
    assert list(tmp_path.iterdir()) == [journal.segments[0].path]
    assert ids(journal.read(1)[0]) == [1]


def test_rows_are_read_in_order_until_they_are_done(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert all(journal.append(row(i)) for i in range(5))
    assert ids(journal.read(2)[0]) == [0, 1]
    rows, size = journal.read(3)
    journal.done(len(rows), size)
    assert (ids(rows), journal.rows) == ([0, 1, 2], 2)
    assert drained(journal) == [3, 4]


def test_what_is_done_takes_no_room(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment=2000)
    for start in range(0, 200, 50):
        for i in range(start, start + 50):
            journal.append(row(i, 100))
        assert drained(journal) == list(range(start, start + 50))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == 0
    assert len(list(tmp_path.iterdir())) == 1
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_rows_longer_than_a_segment_pass(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment=1000)
    assert all(journal.append(row(i, 2_000_000)) for i in range(3))
    assert drained(journal) == [0, 1, 2]


def test_two_threads_lose_and_double_nothing(tmp_path: Path) -> None:
    journal, found = Journal(tmp_path, segment=5000), []
    writer = threading.Thread(target=lambda: [journal.append(row(i)) for i in range(3000)])
    writer.start()
    while writer.is_alive():
        found += drained(journal, 50)
    found += drained(journal)
    assert found == list(range(3000))


def test_the_size_is_bounded(tmp_path: Path) -> None:
    journal = Journal(tmp_path, largest=1000, segment=300)
    accepted = [journal.append(row(i, 50)) for i in range(30)]
    assert accepted.count(True) < 12
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 1000
    assert drained(journal) == list(range(accepted.count(True)))
    assert journal.append(row(99))


def test_a_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    code = (
        "import sys, signal, resource\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pathlib import Path\n"
        "from steer.experiments.storage.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "taken = [journal.append(('events', {'id': str(i), 'reason': 'x' * 60})) for i in range(30)]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "later = journal.append(('events', {'id': '99', 'reason': ''}))\n"
        "print(taken.count(True), taken[-1], later)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, tmp_path], capture_output=True, text=True, check=True)
    count, last, later = done.stdout.split()
    assert (last, later) == ("False", "True")
    assert resource.RLIM_INFINITY != 1000
    ((rows, damaged),) = abandoned(tmp_path)
    assert (ids(rows), damaged) == ([*range(int(count)), 99], 0)


def test_a_killed_process_leaves_what_it_had_appended(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal\n"
        "from pathlib import Path\n"
        "from steer.experiments.storage.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), segment=500)\n"
        "for i in range(40): assert journal.append(('events', {'id': str(i), 'reason': 'x'}))\n"
        "print('done', flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (-signal.SIGKILL, "done")
    found = sorted(number for rows, _ in abandoned(tmp_path) for number in ids(rows))
    assert found == list(range(40))
    assert list(tmp_path.iterdir()) == []


def test_files_that_a_process_holds_are_left_to_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(row(1))
    assert list(abandoned(tmp_path)) == []
    journal.close()  # with a row that is not in the database
    assert [ids(rows) for rows, _ in abandoned(tmp_path)] == [[1]]


def test_a_damaged_line_is_counted_and_the_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'["events",{"id":"1"}]\n["events",{"id"\n\xff\n["events",{"id":"2"}]\n["ev')
    assert [(ids(rows), damaged) for rows, damaged in abandoned(tmp_path)] == [([1, 2], 3)]


@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
def test_a_full_file_system_leaves_whole_rows(tmp_path: Path) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True)
    if done.returncode:
        pytest.skip("this container may not mount")
    try:
        journal = Journal(tmp_path)
        taken = [journal.append(row(i, 1000)) for i in range(100)]
        assert taken[0]
        assert not taken[-1]
        assert drained(journal) == list(range(taken.count(True)))
        assert journal.append(row(7))
        journal.close()
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
