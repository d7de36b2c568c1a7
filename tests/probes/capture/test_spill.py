"""Spilled activations: on disk they are bit for bit what they would be in memory, and nothing stays behind."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from probes.capture.spill import Spill
from probes.seeds import child_seed
from vectors.errors import OutputError

LAYERS, EXAMPLES, HIDDEN = 3, 10, 7


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def filled(memory: int | None, dtype: torch.dtype = torch.float32) -> Spill:
    """A spill written in pieces, out of order."""
    spill = Spill(LAYERS, EXAMPLES, HIDDEN, memory)
    values = torch.randn(LAYERS, EXAMPLES, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
    for indices in ([7, 2, 9], [0], [1, 3, 4, 5], [8, 6]):
        for layer in (2, 0, 1):
            spill.write(layer, indices, values[layer, indices])
    return spill


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_disk_and_memory_hold_the_same_bits(dtype: torch.dtype) -> None:
    with filled(None, dtype) as in_memory, filled(0, dtype) as on_disk:
        assert in_memory.file is None
        assert on_disk.memory is None
        for layer in range(LAYERS):
            found = on_disk.read(layer)
            assert found.dtype == torch.float32
            assert found.shape == (EXAMPLES, HIDDEN)
            assert torch.equal(found, in_memory.read(layer))


def test_rows_that_are_strided_are_stored_as_they_are() -> None:
    rows = torch.arange(2.0 * HIDDEN).view(HIDDEN, 2).T
    with Spill(1, 2, HIDDEN, 0) as spill:
        spill.write(0, [1, 0], rows)
        assert torch.equal(spill.read(0), rows.flip(0))


@pytest.mark.parametrize("room", [0, -1])
def test_the_limit_tells_memory_from_disk(room: int) -> None:
    with Spill(LAYERS, EXAMPLES, HIDDEN, 4 * LAYERS * EXAMPLES * HIDDEN + room) as spill:
        assert (spill.memory is None) == (room < 0)


def test_the_file_has_no_name_and_is_gone_when_it_is_closed(folder: Path) -> None:
    with filled(0) as spill:
        assert spill.file is not None
        assert not [*folder.iterdir()]
        descriptor = spill.file.fileno()
        assert os.fstat(descriptor).st_size == 4 * LAYERS * EXAMPLES * HIDDEN
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    spill.close()  # twice does no harm


def test_the_file_is_closed_when_the_work_fails() -> None:
    spill = filled(0)
    file = spill.file
    assert file is not None
    with pytest.raises(KeyboardInterrupt), spill:
        raise KeyboardInterrupt
    assert file.closed


@pytest.mark.parametrize("room", [0, 4 * HIDDEN + 5], ids=["nothing fits", "a row is cut"])
def test_a_full_disk_is_an_error_that_says_how_much_is_needed(folder: Path, room: int) -> None:
    # A limit on the size of files behaves like a disk that is full.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Spill(LAYERS, EXAMPLES, HIDDEN, 0) as spill:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
            with pytest.raises(OutputError, match=r"the activations \(0 MiB\) can't be kept in") as caught:
                spill.write(0, range(EXAMPLES), torch.zeros(EXAMPLES, HIDDEN))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert str(folder) in caught.value.problems[0]
    assert "TMPDIR" in caught.value.hint


def test_a_folder_for_temporary_files_that_is_not_there_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "none"))
    with pytest.raises(OutputError, match="no temporary file can be made") as caught:
        Spill(LAYERS, EXAMPLES, HIDDEN, 0)
    assert "TMPDIR" in caught.value.hint


# Seeds


def test_child_seeds_follow_from_the_seed_and_the_names_alone() -> None:
    assert child_seed(0, "fold", "a") == child_seed(0, "fold", "a")
    found = {
        child_seed(seed, *names) for seed in (0, 1) for names in (("a",), ("b",), ("a", "b"), ("ab",), ("b", "a"), ())
    }
    assert len(found) == 12
    assert all(0 <= seed < 2**63 for seed in found)


def test_child_seeds_are_the_same_on_every_machine() -> None:
    assert child_seed(0, "bootstrap") == 3_145_603_324_136_799_074
