"""What a method says in its formula and what the engine computes in the compiled pass are the same bits.

The formula works on whole arrays; the engine reads mapped files in tiles, pieces in memory, or on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merges import methods
from merges.engine import fused
from merges.engine.jobs import run
from merges.engine.pool import Pool
from merges.engine.readers import Array, Dense
from merges.engine.tensor_task import Input, TensorTask
from merges.methods.breadcrumbs import breadcrumbs
from merges.methods.breadcrumbs_ties import breadcrumbs_ties
from merges.methods.dare_linear import dare_linear
from merges.methods.dare_ties import dare_ties
from merges.methods.della import della
from merges.methods.della_linear import della_linear
from merges.methods.sce import sce
from merges.methods.ties import ties
from vectors.weights import read_header

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PATHS = ["mapped files", "memory", *DEVICES]
SHAPE = (31, 147)  # several tiles, the last one short

# By the method's name: its formula, of the deltas, the numbers of each input, and the keys of their randomness.
FORMULAS: dict[str, Callable[[np.ndarray, dict[str, np.ndarray], np.ndarray], np.ndarray]] = {
    "ties": lambda d, each, keys: ties(d, each["density"], each["weight"]),
    "breadcrumbs": lambda d, each, keys: breadcrumbs(d, each["density"], each["gamma"], each["weight"]),
    "breadcrumbs_ties": lambda d, each, keys: breadcrumbs_ties(d, each["density"], each["gamma"], each["weight"]),
    "dare_linear": lambda d, each, keys: dare_linear(d, each["density"], each["weight"], keys),
    "dare_ties": lambda d, each, keys: dare_ties(d, each["density"], each["weight"], keys),
    "della": lambda d, each, keys: della(d, each["density"], each["weight"], keys, each["epsilon"]),
    "della_linear": lambda d, each, keys: della_linear(d, each["density"], each["weight"], keys, each["epsilon"]),
    "sce": lambda d, each, keys: sce(d, 1.0),
}


def deltas(kind: str, count: int) -> np.ndarray:
    """Some float32 deltas [count, *SHAPE]."""
    draw = np.random.default_rng(count)
    values = draw.standard_normal((count, *SHAPE))
    if kind == "few":  # few magnitudes, each of them often, and votes that cancel
        values = np.round(values * 2) / 2
    if kind == "sparse":
        values *= draw.random(values.shape) < 0.2
    return values.astype(np.float32)


def computed(name: str, values: np.ndarray, path: str, tmp_path: Path, **options: Any) -> tuple[np.ndarray, TensorTask]:
    """The merged delta as the engine computes it, float32, and the task."""
    method = methods.find(name)
    each = {o.name: np.linspace(0.3, 0.7, len(values)) for o in method.options if o.each}
    if "weight" in each:
        each["weight"] = np.linspace(-0.5, 1.5, len(values)) + 0.2
    plain = {o.name: options.get(o.name, o.default) for o in method.options if not o.each}
    readers: list[Any] = [Array(row) for row in values]
    if path != "memory":
        save_file({f"{m}": torch.from_numpy(row) for m, row in enumerate(values)}, tmp_path / "deltas")
        entries = read_header(tmp_path / "deltas")[0]
        readers = [Dense(entries[f"{m}"]) for m in range(len(values))]
    inputs = tuple(Input(f"m{m}", reader, True, 77 * m + 5) for m, reader in enumerate(readers))
    with Pool(2, torch.device(path) if path in DEVICES else None) as pool:
        task = TensorTask("w", SHAPE, "F32", inputs, None, method, pool, each, plain, as_delta=True)
        assert (task.mapped_inputs is None) == (path == "memory")
        return np.concatenate([piece.bits.copy() for piece in run([task], pool)]).reshape(SHAPE), task


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["wide", "few", "sparse"])
@pytest.mark.parametrize("count", [1, 3, fused.FEW + 1])
@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_a_formula_and_the_compiled_pass_give_the_same_bits(
    name: str, count: int, kind: str, path: str, tmp_path: Path
) -> None:
    values = deltas(kind, count)
    merged, task = computed(name, values, path, tmp_path)
    keys = np.array([source.key for source in task.inputs], np.uint64)
    formula = FORMULAS[name](values.copy(), dict(task.each), keys)
    assert formula.dtype == np.float64
    # -0 and 0 are one number, and where nothing is summed their sign is nobody's.
    np.testing.assert_array_equal((formula.astype(np.float32) + 0.0).view(np.uint32), (merged + 0.0).view(np.uint32))


def test_sce_selects_as_its_formula_does(tmp_path: Path) -> None:
    values = deltas("few", 3)
    merged, _ = computed("sce", values, "memory", tmp_path, select_topk=0.3)
    np.testing.assert_array_equal(sce(values, 0.3).astype(np.float32), merged)


def test_ties_by_hand() -> None:
    """Trim to the greater half, elect by the sum, average what agrees."""
    values = np.array([[3, -1, 2, 0.5], [-1, -2, 0.1, 3]], np.float32)
    np.testing.assert_array_equal(ties(values, np.array([0.5, 0.5]), np.ones(2)), [3, -2, 2, 3])


@pytest.mark.parametrize("formula", [dare_linear, dare_ties])
def test_of_a_density_of_0_a_formula_keeps_nothing(formula: Callable[..., np.ndarray]) -> None:
    deltas, keys = np.ones((2, 5), np.float32), np.arange(2, dtype=np.uint64)
    nothing = formula(deltas, np.zeros(2), np.ones(2), keys)
    assert np.array_equal(nothing, np.zeros(5))
    one = formula(deltas, np.array([0.0, 1.0]), np.ones(2), keys)
    assert np.array_equal(one, np.ones(5))
