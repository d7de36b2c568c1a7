"""The pass over mapped files, compiled or in torch, gives the bits of the one over pieces in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merges import methods
from merges.engine import fused, gpu
from merges.engine.jobs import run
from merges.engine.pool import Pool
from merges.engine.readers import Dense
from merges.engine.tensor_task import Input, TensorTask
from vectors.errors import ArtifactError
from vectors.weights import read_header

FUSED = sorted(name for name, method in methods.available().items() if method.elementwise is not None)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def made(
    path: Path, arrays: list[np.ndarray], dtypes: list[str], deltas: list[bool], method: str, pool: Pool, **more: Any
) -> TensorTask:
    """A tensor whose base (the first) and inputs lie in a file."""
    save_file(
        {f"{i}": torch.from_numpy(a).to(DTYPES[d]) for i, (a, d) in enumerate(zip(arrays, dtypes, strict=True))}, path
    )
    entries = read_header(path)[0]
    chosen = methods.find(method)
    inputs = tuple(Input(f"m{i}", Dense(entries[f"{i}"]), deltas[i - 1], 77 * i) for i in range(1, len(arrays)))
    each = {o.name: np.linspace(0.3, 0.9, len(inputs)) for o in chosen.options if o.each}
    options = {o.name: o.default for o in chosen.options if not o.each} | more.pop("options", {})
    return TensorTask(
        "w", arrays[0].shape, more.pop("dtype", "F32"), inputs, Dense(entries["0"]), chosen, pool, each, options, **more
    )


def test_all_that_adds_up_is_fused() -> None:
    assert {"ties", "task_arithmetic", "linear", "dare_ties", "breadcrumbs", "slerp", "karcher", "sce"} <= set(FUSED)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(FUSED),
    size=st.sampled_from([1, 2, 4095, 4097, 9001]),
    inputs=st.sampled_from([1, 2, 3, 4, fused.FEW, fused.FEW + 1]),
    dtypes=st.lists(st.sampled_from(list(DTYPES)), min_size=3, max_size=3),
    deltas=st.lists(st.booleans(), min_size=2, max_size=2),
    out=st.sampled_from(["F32", "BF16"]),
    as_delta=st.booleans(),
    variant=st.sampled_from(
        [{}, {"rescale": "l1", "zero": "positive", "lambda": 0.7}, {"combine": "sum", "elect": "after"}]
    ),
)
def test_both_paths_give_the_same_bits(
    tmp_path: Path, method: str, size: int, inputs: int, dtypes: list[str], deltas: list[bool], out: str,
    as_delta: bool, variant: dict[str, Any],
) -> None:  # fmt: skip
    draw = np.random.default_rng(size)
    inputs = min(inputs, methods.find(method).inputs[1] or inputs)
    inputs = max(inputs, methods.find(method).inputs[0])
    dtypes, deltas = (dtypes * inputs)[: inputs + 1], (deltas * inputs)[:inputs]
    base = draw.standard_normal(size).astype(np.float32)
    arrays = [base, *((not d) * base + 0.1 * draw.standard_normal(size).astype(np.float32) for d in deltas)]
    known = {o.name for o in methods.find(method).options}
    options = {name: value for name, value in variant.items() if name in known}
    found = []
    with Pool(2) as pool:
        for direct, device in ((True, None), (False, None), *((True, torch.device(name)) for name in DEVICES)):
            pool.device = device
            tensor = made(
                tmp_path / "t.safetensors", arrays, dtypes, deltas, method, pool,
                options=options, dtype=out, as_delta=as_delta,
            )  # fmt: skip
            if direct:
                assert tensor.mapped_inputs is not None
            else:
                tensor.__dict__["mapped_inputs"] = None
            found.append(np.concatenate([piece.copy() for _, piece in run([tensor], pool)]))
    for other in found[1:]:
        np.testing.assert_array_equal(found[0].view(np.uint8), other.view(np.uint8))


def test_what_is_not_finite_is_named_and_what_lies_askew_is_read_otherwise(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = [draw.standard_normal(5000).astype(np.float32) for _ in range(3)]
    with Pool(1) as pool:
        arrays[2][4999] = np.inf
        for method in ("ties", "task_arithmetic"):
            tensor = made(tmp_path / "t.safetensors", arrays, ["BF16"] * 3, [False] * 2, method, pool)
            with pytest.raises(ArtifactError, match="m2 holds a value that is not finite in w, at element 4999"):
                list(run([tensor], pool))
        arrays[2][4999] = 0
        tensor = made(tmp_path / "t.safetensors", arrays, ["F32"] * 3, [False] * 2, "ties", pool)
        content = (tmp_path / "t.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        text = content[8 : 8 + length].rstrip(b" ") + b" " * 3
        text += b" " * (len(text) % 2 == 0)  # of an odd length, so that no number begins where it should
        (tmp_path / "odd").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        askew = read_header(tmp_path / "odd")[0]
        inputs = tuple(i._replace(reader=Dense(askew[f"{n}"])) for n, i in enumerate(tensor.inputs, 1))
        odd = TensorTask(
            "w", tensor.shape, "F32", inputs,
            Dense(askew["0"]), tensor.method, pool, tensor.each, tensor.options,
        )  # fmt: skip
        assert odd.mapped_inputs is None
        for (_, a), (_, b) in zip(run([tensor], pool), run([odd], pool), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_random_mask_depends_on_the_index_alone() -> None:
    from merges.engine import kernels

    keys, keep = np.array([5, 6], np.uint64), np.array([0.3, 0.8])
    whole = np.ones((2, 101), np.float32)
    kernels.drop(whole, keys, keep, 1000)
    for first, last in ((0, 1), (1, 2), (1, 50), (50, 101), (100, 101)):
        part = np.ones((2, last - first), np.float32)
        kernels.drop(part, keys, keep, 1000 + first)
        np.testing.assert_array_equal(part, whole[:, first:last])
    assert fused.TILE % 2 == 0


def test_a_nan_is_seen_on_a_device_whatever_its_bits() -> None:
    """Those of a GPU's own NaN are carried to the bits of -0 by rounding up."""
    for bits in (0x7FFFFFFFFFFFFFFF, 0x7FF8000000000000, 0xFFF8000000000000, 0x7FF0000000000000):
        out = torch.from_numpy(np.array([0, bits], np.uint64).view(np.float64))
        assert not gpu._bfloat16(out)[1]
        assert not gpu._float32(out)[1]
    assert gpu._bfloat16(torch.tensor([0.0, -1e30], dtype=torch.float64))[1]


def test_what_overflows_on_the_way_is_refused_on_every_path(tmp_path: Path) -> None:
    arrays = [np.full(3000, value, np.float32) for value in (3e38, -3e38, -3e38)]
    for device in (None, *map(torch.device, DEVICES)):
        with Pool(1, device) as pool:
            tensor = made(tmp_path / "t.safetensors", arrays, ["BF16"] * 3, [False] * 2, "ties", pool, dtype="BF16")
            with pytest.raises(ArtifactError):
                list(run([tensor], pool))
