"""Loading: a folder that can't be read is one clear error, whatever transformers raises over it."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from probes.models import loading as loading
from vectors.errors import ModelError


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the pico model that a test may damage."""
    return shutil.copytree(model_folder, tmp_path / "model")


def test_a_model_is_found_without_its_weights_and_loaded_from_there(folder: Path) -> None:
    found = loading.open_model(folder)
    assert found.config.num_hidden_layers == 4
    assert loading.load(found, "cpu", "float32").identity == found.identity


def test_weights_of_other_sizes_than_the_configuration_says_are_a_model_error(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ModelError, match="can't be loaded"):
        loading.load(folder, "cpu", "float32")


def test_a_tensor_of_a_dtype_that_no_one_knows_is_a_model_error(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].replace(b'"F32"', b'"F99"', 1)
    file.write_bytes(content[:8] + header + content[8 + length :])
    with pytest.raises(ModelError, match="has the unknown dtype F99"):
        loading.load(folder, "cpu", "float32")


@pytest.mark.parametrize(
    ("name", "problem", "hint"),
    [
        ("pytorch_model.bin", "pytorch_model.bin, which are pickles and may run code", "weights_only=True"),
        ("model.gguf", "as GGUF, not as safetensors", "use the model that they were made of"),
        ("notes.txt", "has no safetensors weights", "save the model as safetensors"),
    ],
)
def test_a_folder_without_safetensors_says_what_it_has_and_how_to_convert_it(
    folder: Path, name: str, problem: str, hint: str
) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError) as caught:
        loading.open_model(folder)
    assert problem in str(caught.value)
    assert hint in caught.value.hint


def test_a_configuration_of_no_known_model_is_a_model_error(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nothing"}))
    with pytest.raises(ModelError, match="can't be loaded"):
        loading.open_model(folder)
