"""The k-th greatest magnitude is found exactly, in one tensor and over many, whatever the values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from merges.engine import gpu, selection, tensor_task
from merges.engine.pool import Pool
from merges.engine.readers import Array, Dense
from merges.engine.tensor_task import Computation, Input, TensorTask
from vectors.weights import read_header

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PLAIN = Computation(space="weight")


def make(arrays: list[np.ndarray], pool: Pool) -> TensorTask:
    inputs = tuple(Input(f"m{i}", Array(a), False) for i, a in enumerate(arrays))
    return TensorTask("w", arrays[0].shape, "F32", inputs, None, PLAIN, pool)


@given(
    seed=st.integers(0, 999),
    size=st.integers(1, 3000),
    kind=st.sampled_from(["wide", "few", "zeros", "near"]),
    chunk=st.sampled_from([7, 64, 1 << 15]),
)
def test_it_is_what_sorting_finds(seed: int, size: int, kind: str, chunk: int) -> None:
    draw = np.random.default_rng(seed)
    values = draw.standard_normal((2, size)) * 10.0 ** draw.integers(-42, 30, (2, size))
    if kind == "few":
        values = np.round(draw.standard_normal((2, size)) * 2)
    if kind == "zeros":
        values *= draw.random((2, size)) < 0.3
    if kind == "near":
        values = 1 + draw.integers(0, 50, (2, size)) * 2.0**-23
    arrays = list(values.astype(np.float32))
    ranks = [sorted({1, size, int(draw.integers(1, size + 1))} | {max(size // 2, 1)})] * 2
    before = tensor_task.CHUNK, tensor_task.GROUP
    tensor_task.CHUNK, tensor_task.GROUP = chunk, 4 * chunk  # so that small tensors have many pieces
    try:
        with Pool(2) as pool:
            found = selection.magnitudes([make(arrays, pool)], ranks)
    finally:
        tensor_task.CHUNK, tensor_task.GROUP = before
    for row, array in enumerate(arrays):
        ordered = np.sort(np.abs(array))[::-1]
        np.testing.assert_array_equal(found[row], [ordered[rank - 1] for rank in ranks[row]])


@pytest.mark.parametrize("sizes", [(5, 1, 300), (40000, 70000, 3)])
def test_over_several_tensors_it_is_that_of_the_flattened_model(sizes: tuple[int, ...]) -> None:
    draw = np.random.default_rng(0)
    arrays = [
        [(s * draw.standard_normal(n)).astype(np.float32) for _ in range(2)]
        for n, s in zip(sizes, (1, 0.1, 3), strict=True)
    ]
    total = sum(sizes)
    with Pool(2) as pool:
        found = selection.magnitudes([make(pair, pool) for pair in arrays], [[1, total // 5], [total // 2, total]])
    for row, ranks in enumerate(([1, total // 5], [total // 2, total])):
        ordered = np.sort(np.abs(np.concatenate([pair[row] for pair in arrays])))[::-1]
        np.testing.assert_array_equal(found[row], [ordered[rank - 1] for rank in ranks])


SIZES = (300_000, 17, 70_001)  # 17: shorter than what is sampled at once, and alone sampled not at all


def mapped(path: Path, kind: str, pool: Pool) -> tuple[list[TensorTask], list[np.ndarray]]:
    """Tensors of mapped files, two inputs each, and the magnitudes of both inputs over all of them."""
    draw = np.random.default_rng(1)
    tensors, rows = [], []
    for number, size in enumerate(SIZES):
        values = draw.standard_normal((2, size)).astype(np.float32)
        if kind == "few":  # as the deltas of bfloat16 models: few values, each of them often
            values = np.round(2 * values) / 2
        if kind == "zeros":
            values *= draw.random((2, size)) < 0.1
        if kind == "columns":  # of very different size, in rows of 1,024
            values *= (10.0 ** ((np.arange(size) % 1024) / 200)).astype(np.float32)
        if kind == "sorted":
            values.sort(axis=1)
        file = path / f"{kind}{number}.safetensors"
        save_file({f"{m}": torch.from_numpy(row) for m, row in enumerate(values)}, file)
        entries = read_header(file)[0]
        inputs = tuple(Input(f"m{m}", Dense(entries[f"{m}"]), False) for m in range(2))
        tensors.append(TensorTask("w", (size,), "F32", inputs, None, PLAIN, pool))
        rows.append(np.abs(values))
    return tensors, [np.sort(np.concatenate([part[m] for part in rows]))[::-1] for m in range(2)]


@pytest.mark.parametrize("kind", ["wide", "few", "zeros", "columns", "sorted"])
def test_one_pass_over_mapped_files_finds_what_sorting_does(kind: str, tmp_path: Path) -> None:
    total = sum(SIZES)
    ranks = [[1, 2, total // 100, total // 5], [total // 2, total - 5, total, total]]
    with Pool(2) as pool:
        tensors, ordered = mapped(tmp_path, kind, pool)
        found = selection._bracketed(tensors, np.array(ranks), total)
    assert found is not None
    for row in range(2):
        np.testing.assert_array_equal(found[row], [ordered[row][rank - 1] for rank in ranks[row]])


@pytest.mark.parametrize("kind", ["wide", "few"])
@pytest.mark.parametrize("device", DEVICES)
def test_on_a_device_bit_patterns_are_counted_too(device: str, kind: str, tmp_path: Path) -> None:
    total = sum(SIZES)
    ranks = [[1, 2, total // 100, total // 5], [total // 2, total - 5, total, total]]
    with Pool(2, torch.device(device)) as pool:
        tensors, ordered = mapped(tmp_path, kind, pool)
        found = selection.magnitudes(tensors, ranks)
        assert gpu.coarse(tensors, pool.device) is not None  # it was not the threads that counted
    for row in range(2):
        np.testing.assert_array_equal(found[row], [ordered[row][rank - 1] for rank in ranks[row]])


def test_many_small_tensors_are_ranked_together(tmp_path: Path) -> None:
    """So small that none has a share of the sample."""
    draw = np.random.default_rng(0)
    values = draw.standard_normal((200, 1000)).astype(np.float32)
    save_file({f"{i}": torch.from_numpy(row) for i, row in enumerate(values)}, tmp_path / "many")
    entries = read_header(tmp_path / "many")[0]
    with Pool(2) as pool:
        tensors = [
            TensorTask("w", (1000,), "F32", (Input("m", Dense(entries[f"{i}"]), False),), None, PLAIN, pool)
            for i in range(200)
        ]
        found = selection.magnitudes(tensors, [[1, 40_000, 200_000]])
    ordered = np.sort(np.abs(values).reshape(-1))[::-1]
    np.testing.assert_array_equal(found[0], ordered[[0, 39_999, 199_999]])


@pytest.mark.parametrize("wrong", ["above", "below", "room", "stored", "one"])
def test_where_the_sample_leads_astray_two_passes_find_it(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(SIZES)
    ranks = [[total // 5], [total // 2]]
    with Pool(2) as pool:
        tensors, ordered = mapped(tmp_path, "wide", pool)
        lows, highs, share = selection._brackets(tensors, np.array(ranks), total)
        moved = {
            "above": (lows * 1.5, highs * 1.5), "below": (lows * 0.5, lows * 0.6), "one": (lows, lows),
            "room": (lows * 0, highs * 9),
        }  # fmt: skip
        if wrong in moved:
            monkeypatch.setattr(selection, "_brackets", lambda *_: (*moved[wrong], share))
        monkeypatch.setattr(selection, "ROOM", 1000 if wrong == "room" else selection.ROOM)
        monkeypatch.setattr(selection, "STORED", 10 if wrong == "stored" else selection.STORED)
        assert selection._bracketed(tensors, np.array(ranks), total) is None
        found = selection.magnitudes(tensors, ranks)
    for row in range(2):
        np.testing.assert_array_equal(found[row], [ordered[row][rank - 1] for rank in ranks[row]])
