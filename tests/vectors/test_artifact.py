"""The artifact file: its bytes are a function of its content, and no damage to them goes unnoticed."""

from __future__ import annotations

import json
import os
import random
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as safetensors_save

from vectors import artifact
from vectors.artifact import KEY
from vectors.documents.schema import excerpt
from vectors.errors import ArtifactError, OutputError
from vectors.storage.files import canonical_json

REPOSITORY = Path(__file__).parents[2]

TENSORS = {"layer.3": torch.tensor([1.5, -0.0, 1e-42]), "layer.12": torch.tensor([3.4e38, 2.0, -7.25])}
METADATA: dict[str, Any] = {"method": {"name": "diffmean"}, "auroc": 0.1 + 0.2, "tiny": 1e-5, "apply": [3], "名": "é"}


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of safetensors bytes, and what follows it."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def bare(dtype: str, shape: list[int], data: bytes, marks: object = ...) -> bytes:
    header: dict[str, Any] = {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
    return safetensors(header if marks is ... else header | {"__metadata__": marks}, data)


def read(folder: Path, content: bytes) -> artifact.Artifact:
    path = folder / "read.safetensors"
    path.write_bytes(content)
    return artifact.read(path)


def content_of(found: artifact.Artifact) -> object:
    """What was read, floats by their bits."""
    tensors = {
        name: (str(t.dtype), list(t.shape), t.reshape(-1).view(torch.uint8).tolist())
        for name, t in found.tensors.items()
    }
    return tensors, found.metadata


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    digest = artifact.write(tmp_path / "a.safetensors", TENSORS, METADATA)
    found = artifact.read(tmp_path / "a.safetensors")
    assert found.digest == digest
    assert found.metadata is not None
    assert METADATA.items() <= found.metadata.items()
    for name, tensor in TENSORS.items():
        assert found.tensors[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_the_digest_is_that_of_the_file_as_any_tool_computes_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digest = artifact.write(path, TENSORS, METADATA)
    printed = subprocess.run(["sha256sum", str(path)], check=True, capture_output=True, text=True).stdout
    assert digest == "sha256:" + printed.split()[0]


def test_insertion_order_does_not_change_a_byte() -> None:
    backwards = dict(reversed(TENSORS.items()))
    turned = dict(reversed(METADATA.items())) | {"method": dict(METADATA["method"])}
    assert artifact.encode(backwards, turned) == artifact.encode(TENSORS, METADATA)


def test_processes_with_different_hash_seeds_write_the_same_bytes() -> None:
    script = """
import sys, torch
from vectors import artifact
keys = [f"key{i}" for i in range(30)]
order = set(keys) if sys.argv[1] == "0" else set(reversed(keys))
tensors = {f"layer.{k[3:]}": torch.arange(4.0) * int(k[3:]) for k in order}
print(artifact.digest_bytes(artifact.encode(tensors, {k: {k: 1.5, "b": [k]} for k in order})))
"""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, seed],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        for seed in ("0", "4242")
    ]
    digests = [process.communicate(timeout=120)[0].strip() for process in running]
    assert digests[0].startswith("sha256:")
    assert digests[0] == digests[1]


def test_the_file_has_exactly_one_metadata_key_and_it_holds_canonical_json() -> None:
    header, _ = parts(artifact.encode(TENSORS, METADATA))
    assert list(header["__metadata__"]) == [KEY]
    text = header["__metadata__"][KEY]
    assert text == canonical_json(json.loads(text))
    assert "é" in text
    assert json.loads(text)["schema"] == artifact.SCHEMA


@pytest.mark.parametrize(
    "other",
    [
        lambda: (TENSORS, METADATA | {"auroc": 0.3}),
        lambda: (TENSORS, {k: v for k, v in METADATA.items() if k != "auroc"}),
        lambda: ({"layer.3": TENSORS["layer.3"]}, METADATA),
        lambda: ({"layer.3": TENSORS["layer.12"], "layer.12": TENSORS["layer.3"]}, METADATA),
        lambda: ({k: v.double() for k, v in TENSORS.items()}, METADATA),
        lambda: ({k: v[None] for k, v in TENSORS.items()}, METADATA),
        lambda: ({"layer.3": torch.tensor([1.5, 0.0, 1e-42]), "layer.12": TENSORS["layer.12"]}, METADATA),
    ],
)
def test_other_content_has_another_digest_and_another_checksum(other: Callable[[], Any]) -> None:
    def checksum(content: bytes) -> str:
        return json.loads(parts(content)[0]["__metadata__"][KEY])["checksum"]

    first, second = artifact.encode(TENSORS, METADATA), artifact.encode(*other())
    assert first != second
    assert checksum(first) != checksum(second)


def test_a_copy_that_was_read_and_written_again_is_the_same_file(tmp_path: Path) -> None:
    content = artifact.encode(TENSORS, METADATA)
    found = read(tmp_path, content)
    assert found.metadata is not None
    assert artifact.encode(found.tensors, found.metadata) == content


def test_tensors_that_share_memory_or_have_gaps_are_written_as_their_content() -> None:
    whole = torch.arange(8.0)
    shared = {"a": whole, "b": whole, "c": whole[::2], "d": torch.ones(1).expand(3)}
    apart = {"a": whole.clone(), "b": whole.clone(), "c": torch.tensor([0.0, 2, 4, 6]), "d": torch.ones(3)}
    assert artifact.encode(shared, {}) == artifact.encode(apart, {})


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64, torch.int64, torch.bool]
)
def test_tensors_of_every_dtype_are_written_and_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.tensor([0, 1, 1]).to(dtype), "scalar": torch.tensor(1).to(dtype), "none": torch.empty(0)}
    found = read(tmp_path, artifact.encode(tensors, {}))
    assert content_of(found)[0] == content_of(artifact.Artifact(tensors, None, ""))[0]  # type: ignore[index]


@pytest.mark.parametrize(
    "metadata",
    [{"a": float("nan")}, {"a": [float("inf")]}, {"a": "\ud800"}, {"a": object()}, {"a": {1, 2}}, {1: 0, "b": 1}],
    ids=["nan", "inf", "surrogate", "object", "set", "keys"],
)
def test_metadata_that_json_has_not_is_refused_before_anything_is_written(tmp_path: Path, metadata: Any) -> None:
    with pytest.raises(ArtifactError, match="metadata is not JSON"):
        artifact.write(tmp_path / "a.safetensors", TENSORS, metadata)
    assert not list(tmp_path.iterdir())


def test_a_changed_byte_anywhere_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    content = artifact.encode({"layer.3": torch.tensor([1.5, -2.0])}, {"tiny": 1e-5, "s": 'a"b'})
    original = content_of(read(tmp_path, content))
    chance = random.Random(0)
    harmless = 0
    for at in range(len(content)):
        for flip in (0x01, 0x20, 0x80, 0xFF, chance.randrange(1, 256)):
            changed = bytearray(content)
            changed[at] ^= flip
            try:
                found = read(tmp_path, bytes(changed))
            except ArtifactError:
                continue
            assert content_of(found) == original, f"byte {at} changed by {flip:#x}: {bytes(changed)!r}"
            harmless += 1
    assert harmless < 20


def test_a_file_cut_at_any_length_is_refused(tmp_path: Path) -> None:
    content = artifact.encode(TENSORS, METADATA)
    for length in range(len(content)):
        with pytest.raises(ArtifactError, match="truncated or no safetensors file"):
            read(tmp_path, content[:length])


def test_a_file_with_more_at_its_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no safetensors file"):
        read(tmp_path, artifact.encode(TENSORS, METADATA) + b"\0")


def test_metadata_changed_with_care_does_not_pass_the_checksum(tmp_path: Path) -> None:
    header, data = parts(artifact.encode(TENSORS, METADATA))
    metadata = json.loads(header["__metadata__"][KEY])
    header["__metadata__"][KEY] = canonical_json(metadata | {"auroc": 0.99})
    with pytest.raises(ArtifactError, match="changed after it was written"):
        read(tmp_path, safetensors(header, data))


def test_metadata_moved_to_another_key_does_not_make_the_file_a_bare_one(tmp_path: Path) -> None:
    header, data = parts(artifact.encode(TENSORS, METADATA))
    header["__metadata__"] = {"sueer": header["__metadata__"][KEY]}
    with pytest.raises(ArtifactError, match="under another key"):
        read(tmp_path, safetensors(header, data))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.complex64])
def test_values_that_are_not_finite_are_refused_by_the_name_of_their_tensor(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    tensors = {"layer.1": torch.ones(3), "layer.2": torch.tensor([1.0, value]).to(dtype)}
    for content in (artifact.encode(tensors, {}), safetensors_save(tensors)):
        with pytest.raises(ArtifactError, match=r"not finite, in layer\.2$"):
            read(tmp_path, content)


@pytest.mark.parametrize("schema", [0, 2, "1", None, [1]])
def test_another_schema_is_refused_with_both_numbers(tmp_path: Path, schema: object) -> None:
    content = bare("F32", [1], b"\0" * 4, {KEY: json.dumps({"schema": schema})})
    with pytest.raises(ArtifactError, match=r"has schema .*; this version reads 1") as caught:
        read(tmp_path, content)
    assert excerpt(schema) in str(caught.value)
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("marks", [..., {"format": "pt"}, {}, None])
def test_a_bare_safetensors_file_is_read_without_metadata(tmp_path: Path, marks: object) -> None:
    found = read(tmp_path, bare("F32", [1], struct.pack("<f", 2.5), marks))
    assert found.metadata is None
    assert found.tensors["x"].tolist() == [2.5]


DEEP = "[" * 900 + "]" * 900
METADATA_TEXTS = {
    "a NaN": '{"schema":1,"a":NaN}',
    "an infinity": '{"schema":1,"a":-Infinity}',
    "an overflow": '{"schema":1,"a":1e999}',
    "a lone surrogate": '{"schema":1,"a":"\\ud800"}',
    "a lone surrogate as a key": '{"schema":1,"\\udfff":1}',
    "nesting past the stack": "[" * 200_000,
    "objects past the stack": '{"a":' * 200_000,
    "some nesting": f'{{"schema":1,"a":{DEEP}}}',
    "a huge number": '{"schema":1,"a":' + "9" * 5000 + "}",
    "no JSON": "{",
    "nothing": "",
    "a list": "[1]",
    "a string": '"schema"',
    "null": "null",
    "no checksum": '{"schema":1}',
    "a checksum of another type": '{"schema":1,"checksum":[1]}',
}


@pytest.mark.parametrize("text", METADATA_TEXTS.values(), ids=METADATA_TEXTS)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3"])
def test_metadata_that_no_writer_makes_is_an_artifact_error(tmp_path: Path, text: str, dtype: str) -> None:
    size = {"F32": 4, "BF16": 2, "F8_E4M3": 1}[dtype]
    with pytest.raises(ArtifactError) as caught:
        read(tmp_path, bare(dtype, [1], b"\0" * size, {KEY: text}))
    assert str(tmp_path) in str(caught.value)
    assert caught.value.hint


HEADERS = {
    "no object": b"[]",
    "null": b"null",
    "metadata that is no object": b'{"__metadata__":[]}',
    "metadata values that are no strings": b'{"__metadata__":{"steer":1}}',
    "an unknown dtype": b'{"x":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}',
    "a dtype that torch lacks": b'{"x":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}',
    "offsets that go backwards": b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
    "offsets past the end": b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000000]}}',
    "a shape past 64 bits": b'{"x":{"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,0]}}',
    "an empty shape past 63 bits": b'{"x":{"dtype":"F32","shape":[9223372036854775808,0],"data_offsets":[0,0]}}',
    "a negative shape": b'{"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    "deep nesting": b'{"x":' + b"[" * 100_000,
    "no UTF-8": b'{"\xff":1}',
    "UTF-16": '{"x":1}'.encode("utf-16"),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_no_writer_makes_is_an_artifact_error(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(ArtifactError):
        read(tmp_path, safetensors(header, b"\1" if b"8_E8M0" in header or b"F4" in header else b""))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_an_artifact_error(tmp_path: Path, length: int) -> None:
    with pytest.raises(ArtifactError):
        read(tmp_path, struct.pack("<Q", length) + b"{}")


def test_random_bytes_are_an_artifact_error(tmp_path: Path) -> None:
    chance = random.Random(0)
    for length in (0, 1, 7, 8, 9, 100, 5000):
        with pytest.raises(ArtifactError):
            read(tmp_path, chance.randbytes(length))


def test_a_file_that_is_not_there_or_is_a_folder_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="can't be read: No such file"):
        artifact.read(tmp_path / "none.safetensors")
    with pytest.raises(ArtifactError, match="can't be read: Is a directory"):
        artifact.read(tmp_path)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
def test_the_files_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "a.safetensors"
    before = os.umask(mask)
    try:
        artifact.write(path, TENSORS, METADATA)
        assert os.umask(mask) == mask  # reading the umask left it as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_path_that_can_not_be_written_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="can't be written"):
        artifact.write(tmp_path / "none" / "a.safetensors", TENSORS, METADATA)
