"""A share of the trial of mutated files (`make hostile` runs all): each is refused by an error of ours, or read."""

from __future__ import annotations

import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vectors import formats
from vectors.documents import json_text, yaml_text
from vectors.errors import ArtifactError, SteerError
from vectors.formats import _pickles
from vectors.steering import SteeringVector
from vectors.task import TaskVector
from vectors.taskwriter import Writer

METADATA = {
    "base": {"digest": "sha256:a", "layers": 6}, "method": {"name": "diffmean"}, "apply": [1],
    "measured": {"1": {"auroc": 0.9}}, "recommended": {"layers": [1], "strength": 1.0, "reason": "the middle"},
    "parents": [{"digest": "sha256:b", "strength": 0.5}], "licence": "mit",
}  # fmt: skip
VECTOR = SteeringVector({1: torch.arange(8.0), 2: torch.ones(8)}, METADATA)


def _task(path: Path) -> None:
    with Writer(path, 8192) as writer:
        writer.add("w:positions", "I64", np.array([0, 3, 5], "<i8"))
        writer.add("w:values", "F32", np.ones(3, "<f4"))
        writer.add("v", "F32", np.ones((2, 3), "<f4"))
        parameters = {"w": [[2, 4], "BF16"], "v": [[2, 3], "F32"]}
        writer.finish(
            {"base": METADATA["base"], "storage": {"kind": "sparse:0.5"}, "parameters": parameters, "unchanged": []}
        )
        writer.commit()


def _read_task(path: Path) -> Any:
    vector = TaskVector.open(path)
    vector.verify()
    return {name: vector.delta(name).tolist() for name in vector.parameters}


def _read_vector(path: Path) -> Any:
    vector = formats.read(path)
    return {i: values.tolist() for i, values in vector.layers.items()}


FILES: dict[str, tuple[str, str, Callable[[Path], Any], Callable[[Path], Any]]] = {
    "an artifact": ("v.safetensors", "safetensors", VECTOR.save, _read_vector),
    "a bare file": ("b.safetensors", "safetensors", lambda p: save_file({"layer.1": torch.ones(8)}, p), _read_vector),
    "a control vector": ("v.gguf", "gguf", lambda p: formats.write(VECTOR, p), _read_vector),
    "a dictionary": ("d.pt", "zip", lambda p: torch.save({1: torch.ones(8), 2: torch.ones(8)}, p), _read_vector),
    "a stack": ("s.pt", "zip", lambda p: torch.save(torch.ones(7, 8), p), _read_vector),
    "a file that is not zipped": (
        "l.pt", "bytes", lambda p: torch.save({1: torch.ones(8)}, p, _use_new_zipfile_serialization=False),
        _read_vector,
    ),
    "a task vector": ("t.safetensors", "safetensors", _task, _read_task),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_a_mutated_file_is_refused_by_an_error_of_ours_or_read(name: str, tmp_path: Path) -> None:
    file, form, write, read = FILES[name]
    write(tmp_path / file)
    content, original = (tmp_path / file).read_bytes(), read(tmp_path / file)
    refused: list[str] = []
    for number in range(60):
        changed = mutations.BY_FORM[form](content, random.Random(f"{name} {number}"))
        (tmp_path / file).unlink()
        (tmp_path / file).write_bytes(changed)
        try:
            found = read(tmp_path / file)
        except SteerError as error:
            refused.append(str(error))
            continue
        if name == "an artifact":  # nothing but its metadata can have changed
            assert found == original
    assert len(refused) > 10
    assert max(map(len, refused)) < 100_000


@pytest.mark.parametrize("pickle", mutations.PICKLES)
def test_pickles_that_would_take_all_memory_or_time_are_refused(pickle: bytes, tmp_path: Path) -> None:
    path = tmp_path / "v.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("v/data.pkl", pickle)
    with pytest.raises(ArtifactError):
        formats.read(path)
    path.write_bytes(pickle)
    with pytest.raises(ArtifactError):
        formats.read(path)


def test_a_pickle_of_more_steps_than_any_vector_has_is_refused() -> None:
    import io

    with pytest.raises(ValueError, match="more than 100,000 steps"):
        _pickles.read(io.BytesIO(b"\x80\x02" + b"N" * 100_001 + b"."))


def test_a_large_file_of_something_else_is_refused_without_being_read(tmp_path: Path) -> None:
    # Files with holes: reading one of them would take its whole size in memory.
    header = b'{"model.embed_tokens.weight":{"dtype":"BF16","shape":[1073741824,2],"data_offsets":[0,4294967296]}}'
    shard, zeros = tmp_path / "model.safetensors", tmp_path / "zeros.gguf"
    with shard.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4294967296)
    with zeros.open("wb") as file:
        array = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, 4_000_000_000)
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
        file.truncate(4_000_000_100)
    with pytest.raises(ArtifactError, match="not tensors of a steering vector"):
        formats.read(shard)
    with pytest.raises(ArtifactError, match="architecture none, not controlvector"):
        formats.read(zeros)


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_mutated_documents_are_refused_with_a_reason_or_read(form: str) -> None:
    content = b'{"method": "ties", "models": [{"model": "a", "weight": 1.5}], "parameters": {"lambda": 1.0}, "seed": 3}'
    refused: list[str] = []
    for number in range(150):
        changed = mutations.BY_FORM[form](content, random.Random(f"{form} {number}"))
        try:
            if form == "json":
                json_text.parse(changed, unique=True)
            else:
                yaml_text.parse(changed.decode("utf-8-sig"))
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert max(map(len, refused)) < 2000
