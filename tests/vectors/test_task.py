"""A task vector is read as it was written; one whose tensors or metadata are not what they must be is refused by name.

Anyone can compute the checksum of a file, so every file here has the right one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vectors.errors import ArtifactError
from vectors.task import TaskVector, is_task_vector
from vectors.taskwriter import Writer

SHAPE = (4, 6)
TYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "U64": "<u8", "BF16": "<u2", "F16": "<f2"}
Tensors = Mapping[str, tuple[str, Any]]

DENSE: Tensors = {"w": ("F32", np.ones(SHAPE))}
SPARSE: Tensors = {"w:positions": ("I64", [1, 5, 23]), "w:values": ("F32", [1.0, 2.0, 3.0])}
LOW_RANK: Tensors = {"w:up": ("F32", np.ones((4, 2))), "w:down": ("F32", np.ones((2, 6)))}
RESIDUAL: Tensors = {"w:residual.positions": ("I64", [0, 7]), "w:residual.bits": ("I32", [1, 2])}


def write(path: Path, tensors: Tensors, **metadata: Any) -> Path:
    """A task vector of the parameter `w` with these tensors, and with a right checksum."""
    common = {
        "base": {"digest": "sha256:base"}, "storage": {"kind": "exact"}, "unchanged": ["b"],
        "parameters": {"w": [list(SHAPE), "F32"]}, "shard": [1, 1],
    }  # fmt: skip
    with Writer(path, 65_536) as writer:
        for name, (dtype, values) in tensors.items():
            writer.add(name, dtype, np.ascontiguousarray(values, TYPES[dtype]))
        writer.finish({key: value for key, value in (common | metadata).items() if value is not None})
        writer.commit()
    return path


@pytest.mark.parametrize("tensors", [DENSE, SPARSE, LOW_RANK, {**DENSE, **RESIDUAL}])
def test_every_storage_is_read_and_verified(tensors: Tensors, tmp_path: Path) -> None:
    path = write(tmp_path / "v.safetensors", tensors)
    vector = TaskVector.open(path)
    vector.verify()
    assert vector.delta("w").shape == SHAPE
    assert is_task_vector(path)


@pytest.mark.parametrize(
    "positions", [[1, 5, 24], [-1, 5, 6], [5, 5, 6], [6, 5, 7], [23, 1, 5], [2**62, 2**62 + 1, 2**63 - 1]]
)
def test_positions_that_are_out_of_range_negative_repeated_or_unsorted_are_refused(
    positions: list[int], tmp_path: Path
) -> None:
    sparse = write(tmp_path / "s.safetensors", SPARSE | {"w:positions": ("I64", positions)})
    exact = write(
        tmp_path / "e.safetensors",
        {**DENSE, "w:residual.positions": ("I64", positions), "w:residual.bits": ("I32", [1, 2, 3])},
    )
    for path, part in ((sparse, "positions"), (exact, "residual.positions")):
        with pytest.raises(ArtifactError, match=f"w:{part} is not an ascending list of positions from 0 to 23"):
            TaskVector.open(path).positions("w", part)
    with pytest.raises(ArtifactError):
        TaskVector.open(sparse).delta("w")


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"w": ("I32", np.ones(SHAPE))}, "w is I32, not F32 or BF16"),
        ({"w": ("F64", np.ones(SHAPE))}, "w is F64, not F32 or BF16"),
        (SPARSE | {"w:positions": ("F64", [1, 5, 23])}, "w:positions is F64, not I64"),
        (SPARSE | {"w:positions": ("U64", [1, 5, 23])}, "w:positions is U64, not I64"),
        (SPARSE | {"w:values": ("I32", [1, 2, 3])}, "w:values is I32, not F32"),
        (LOW_RANK | {"w:up": ("BF16", np.ones((4, 2)))}, "w:up is BF16, not F32"),
        (SPARSE | {"w:values": ("F32", [1, 2])}, "the tensors of w do not have the shape"),
        (SPARSE | {"w:positions": ("I64", [[1], [5], [23]])}, "the tensors of w do not have the shape"),
        (LOW_RANK | {"w:down": ("F32", np.ones((3, 6)))}, "the tensors of w do not have the shape"),
        ({**DENSE, **SPARSE}, "the tensors of w do not have the shape"),
        ({**DENSE, "w:residual.positions": ("I64", [1])}, "the residual of w is not a list of positions"),
        ({**DENSE, **RESIDUAL, "w:residual.bits": ("I32", [1])}, "the residual of w is not a list of positions"),
        ({**SPARSE, **RESIDUAL}, "w has a residual and no delta"),
        ({"w": ("F32", np.ones((6, 4)))}, "the tensors of w do not have the shape"),
        ({**DENSE, "x": ("F32", [1.0])}, "x belongs to no parameter"),
    ],
)
def test_tensors_that_are_no_delta_of_a_parameter_are_refused(tensors: Tensors, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        TaskVector.open(write(tmp_path / "v.safetensors", tensors))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"base": None}, "base is missing"),
        ({"base": {"name": "x"}}, "base.digest is missing"),
        ({"base": {"digest": 5}}, "base.digest is 5, not text"),
        ({"base": []}, "base is an empty list, not an object"),
        ({"storage": "exact"}, 'storage is "exact", not an object'),
        ({"storage": {"kind": "zip"}}, 'storage.kind is "zip", not a storage of task vectors'),
        ({"parameters": {"w": [[4, "6"], "F32"]}}, 'parameters.w[0][1] is "6", not a whole number'),
        ({"parameters": {"w": [[4, 6], "I32"]}}, 'parameters.w[1] is "I32"'),
        ({"parameters": {"w": 3}}, "parameters.w is 3, not [shape, dtype]"),
        ({"parameters": ["w"]}, "parameters is a list of 1 value, not an object"),
        ({"unchanged": {"b": 1}}, "unchanged is an object"),
        ({"unchanged": ["w"]}, "w is changed and unchanged at once"),
        ({"shard": "1 of 1"}, 'shard is "1 of 1", not [number, count]'),
        ({"model": {"digest": []}}, "model.digest is an empty list"),
        ({"method": "diff"}, 'method is "diff", not an object'),
        ({"parents": {"a": 1}}, "parents is an object"),
        ({"parents": [5]}, "parents[0] is 5, not an object"),
        ({"licence": 5}, "licence is 5, not text"),
    ],
)
def test_metadata_of_the_wrong_form_is_refused_by_the_name_of_its_field(
    metadata: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError) as caught:
        TaskVector.open(write(tmp_path / "v.safetensors", DENSE, **metadata))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"w": 5}}, {"weight_map": {"w": "../v"}}]
)
def test_an_index_of_the_wrong_form_is_refused(index: Any, tmp_path: Path) -> None:
    (tmp_path / "v.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=r"v\.safetensors\.index\.json"):
        TaskVector.open(tmp_path / "v.safetensors")


def test_a_parameter_in_two_files_of_one_vector_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / f"v-0000{number}-of-00002.safetensors", DENSE, shard=[number, 2])
    files = {f"w{i}": f"v-0000{i}-of-00002.safetensors" for i in (1, 2)}
    (tmp_path / "v.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(ArtifactError, match="holds w, which another file of the vector holds too"):
        TaskVector.open(tmp_path / "v.safetensors")
