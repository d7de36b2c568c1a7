"""TaskVector: the difference between the weights of a fine-tuned model and its base, as a safetensors artifact.

Opening reads headers only; tensors are mapped from disk when they are used. For a parameter `name` the file holds,
depending on the storage,

    exact       name (float32), and for elements where base + delta, rounded, is not the fine-tuned value,
                `name:residual.positions` and `name:residual.bits`
    bf16        name (bfloat16)
    lowrank:R   `name:up` [rows, R] and `name:down` [R, columns] for matrices, name (float32) for the rest
    sparse:D    `name:positions` (ascending indices into the flattened tensor) and `name:values` (float32)

Parameters that did not change are listed in the metadata under `unchanged`. An artifact above 5 GB is split into
several files with an index, named like the shards of a model.
"""

from __future__ import annotations

import math
import os.path
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vectors.artifact import KEY, metadata_of
from vectors.documents import json_text
from vectors.documents.artifacts import INDEX, TASK
from vectors.documents.schema import MOST, excerpt, problems_of
from vectors.errors import ArtifactError, ModelError, shortened
from vectors.storage.files import canonical_json, digest_bytes, digest_json
from vectors.weights import Entry, file_digest, mapped, read_header

if TYPE_CHECKING:
    import numpy as np

KIND = "task-vector"
SHARD = 5_000_000_000  # the largest size of a file, in bytes
STORAGES = ("exact", "bf16", "lowrank:R", "sparse:D")
PARTS = ("up", "down", "positions", "values", "residual.positions", "residual.bits")
AGAIN = "make it again with `steer diff`, or copy it again from where it came"


@dataclass(frozen=True, eq=False)
class TaskVector:
    """An open artifact: `entries` are the tensors of all its files by full name, `metadata` is the files' combined."""

    files: tuple[Path, ...]
    entries: Mapping[str, Entry]
    metadata: Mapping[str, Any]

    @property
    def base(self) -> Mapping[str, Any]:
        """The model it was taken against: `digest`, `architecture`, and `name` where known."""
        return self.metadata["base"]

    @property
    def storage(self) -> str:
        """How the deltas are stored: exact, bf16, lowrank:R or sparse:D, or float32 for the result of a merge."""
        return self.metadata["storage"]["kind"]

    @property
    def exact(self) -> bool:
        """Whether base + vector restores the fine-tuned weights to the bit."""
        return self.storage == "exact"

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The parameters that it changes, by name, with their shapes."""
        return {name: tuple(shape) for name, (shape, _) in self.metadata["parameters"].items()}

    @property
    def unchanged(self) -> frozenset[str]:
        """The names of the parameters that did not change."""
        return frozenset(self.metadata["unchanged"])

    def dtype(self, name: str) -> str:
        """The dtype of a parameter in the fine-tuned model, as safetensors writes it."""
        return self.metadata["parameters"][name][1]

    def part(self, name: str, part: str) -> Entry | None:
        """One of the tensors that make up a parameter's delta, or None."""
        return self.entries.get(f"{name}:{part}")

    def delta(self, name: str) -> np.ndarray:
        """The delta of one parameter, float32 in the parameter's shape. Raises KeyError for a parameter it lacks."""
        import numpy as np

        shape = self.parameters[name]
        entry, up, positions = self.entries.get(name), self.part(name, "up"), self.part(name, "positions")
        if entry is not None:
            raw = mapped(entry)
            wide = (raw.astype(np.uint32) << 16).view(np.float32) if entry.dtype == "BF16" else np.array(raw)
            return wide.reshape(shape)
        if up is not None:
            down = self.entries[f"{name}:down"]
            return mapped(up).reshape(up.shape) @ mapped(down).reshape(down.shape)
        assert positions is not None
        flat = np.zeros(int(np.prod(shape)), np.float32)
        flat[self.positions(name, "positions")] = mapped(self.entries[f"{name}:values"])
        return flat.reshape(shape)

    def positions(self, name: str, part: str) -> np.ndarray:
        """The positions of a sparse parameter or of a residual: int64, ascending, each once, within the parameter.

        `part` is `positions` or `residual.positions`. All of them are read and checked, since a wrong position would
        change another element of the model without an error. Raises ArtifactError.
        """
        entry = self.entries[f"{name}:{part}"]
        array = mapped(entry)
        size = math.prod(self.parameters[name])
        if array.size and not (array[0] >= 0 and array[-1] < size and bool((array[1:] > array[:-1]).all())):
            raise ArtifactError(
                f"{entry.file}: {name}:{part} is not an ascending list of positions from 0 to {size - 1}", AGAIN
            )
        return array

    @property
    def digest(self) -> str:
        """`sha256:` of the file; for several files, of the canonical JSON of their digests by name."""
        if len(self.files) == 1:
            return file_digest(self.files[0])
        return digest_json({path.name: file_digest(path) for path in self.files})

    @property
    def identity(self) -> str:
        """A digest of the content that needs no tensor data: it is computed from the checksums in the headers."""
        return digest_json(self.metadata["checksums"])

    def verify(self) -> None:
        """Read all data and compare it with the checksums. Raises ArtifactError."""
        problems = []
        for path in self.files:
            entries, metadata = _header(path)
            digests = {}
            for name, entry in entries.items():
                digests[name] = digest_bytes(memoryview(mapped(entry).data).cast("B") if entry.size else b"")
            if checksum(metadata, entries, digests) != metadata["checksum"]:
                problems.append(f"{path} was changed after it was written: its checksum does not match")
        if problems:
            raise ArtifactError(problems, AGAIN)

    @staticmethod
    def open(path: str | Path) -> TaskVector:
        """Open an artifact and check its headers. Raises ArtifactError.

        `path` is its only file, its index, or for several files the name without their numbers.
        """
        path = Path(path)
        index = path if path.name.endswith(".index.json") else path.with_name(path.name + ".index.json")
        files: tuple[Path, ...] = (path,)
        if os.path.isfile(index) and (index == path or not os.path.isfile(path)):
            value = json_text.read(index, ArtifactError, AGAIN)
            if problems := problems_of(value, INDEX):
                raise ArtifactError([f"{index} is damaged: {problem}" for problem in problems], AGAIN)
            files = tuple(sorted({index.parent / name for name in value["weight_map"].values()}))
            if not files:
                raise ArtifactError(f"{index} names no file", AGAIN)
        entries: dict[str, Entry] = {}
        parameters: dict[str, Any] = {}
        unchanged: list[str] = []
        checksums: dict[str, str] = {}
        common: dict[str, Any] = {}
        for number, file in enumerate(files, 1):
            file_entries, metadata = _header(file)
            if list(metadata.get("shard", [1, 1])) != [number, len(files)]:
                raise ArtifactError(f"{file} is shard {metadata.get('shard')}, not {number} of {len(files)}", AGAIN)
            if twice := sorted((file_entries.keys() & entries) | (metadata["parameters"].keys() & parameters)):
                raise ArtifactError(
                    f"{file} holds {shortened(twice)}, which another file of the vector holds too", AGAIN
                )
            entries |= file_entries
            parameters |= metadata["parameters"]
            unchanged += metadata["unchanged"]
            checksums[str(number)] = metadata["checksum"]
            shared = {key: value for key, value in metadata.items() if key not in PER_SHARD}
            if common and canonical_json(shared) != canonical_json(common):
                raise ArtifactError(f"{file} belongs to another vector than {files[0]}", AGAIN)
            common = shared
        complete = common | {"parameters": parameters, "unchanged": unchanged, "checksums": checksums}
        return TaskVector(files, entries, complete)


PER_SHARD = ("parameters", "unchanged", "checksum", "shard")  # the keys that differ between the shards of one vector


def is_task_vector(path: Path) -> bool:
    """Whether a safetensors file, or an index of several, is a task vector, by its header alone."""
    if not path.name:
        return False
    if os.path.isfile(path.with_name(path.name + ".index.json")) or path.name.endswith(".safetensors.index.json"):
        return True
    try:
        metadata = json_text.parse(read_header(path)[1].get(KEY, "{}"))
        return isinstance(metadata, dict) and metadata.get("kind") == KIND
    except (ModelError, ValueError):
        return False


def checksum(metadata: Mapping[str, Any], entries: Mapping[str, Entry], digests: Mapping[str, str]) -> str:
    """The digest of a file's metadata (without `checksum`) and of each tensor's name, dtype, shape and content.

    `digests` are those of the tensors' bytes, by name.
    """
    rest = {key: value for key, value in metadata.items() if key != "checksum"}
    parts = [f"{name} {entries[name].dtype} {list(entries[name].shape)} {digests[name]}" for name in sorted(entries)]
    return digest_bytes("\n".join([canonical_json(rest), *parts]).encode())


def _header(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The tensors and the metadata of one file, checked against each other. Raises ArtifactError."""
    try:
        entries, strings = read_header(path)
    except ModelError as error:
        raise ArtifactError(error.problems, AGAIN) from error
    metadata = metadata_of(strings, path)
    if metadata is None:
        raise ArtifactError(f"{path} is not a task vector: it has no metadata of one", "make one with `steer diff`")
    if metadata.get("kind") != KIND:
        raise ArtifactError(
            f"{path} is of the kind {excerpt(metadata.get('kind'))}, not a {KIND}", "make one with `steer diff`"
        )
    problems = problems_of(metadata, TASK) or _misfits(entries, metadata)
    if problems:
        raise ArtifactError([f"{path}: {problem}" for problem in problems], AGAIN)
    return entries, metadata


# The dtypes in which each part of a parameter is stored.
_DTYPES = {
    "": ("F32", "BF16"), "up": ("F32",), "down": ("F32",), "values": ("F32",), "positions": ("I64",),
    "residual.positions": ("I64",), "residual.bits": ("I32",),
}  # fmt: skip


def _misfits(entries: Mapping[str, Entry], metadata: Mapping[str, Any]) -> list[str]:
    """Every way in which the tensors of a file differ from those that its metadata describes."""
    problems = []
    expected = set()
    for name, (shape, _dtype) in metadata["parameters"].items():
        parts = {part: entries.get(f"{name}:{part}") for part in PARTS}
        expected |= {f"{name}:{part}" for part, entry in parts.items() if entry is not None} | {name}
        dense, up, down = entries.get(name), parts["up"], parts["down"]
        positions, values = parts["positions"], parts["values"]
        residual, bits = parts["residual.positions"], parts["residual.bits"]
        if dense is not None:
            fits = list(dense.shape) == shape and not any((up, down, positions, values))
        elif up is not None and down is not None:
            fits = len(up.shape) == len(down.shape) == 2 and [up.shape[0], down.shape[1]] == shape
            fits = fits and up.shape[1] == down.shape[0] and not any((positions, values))
        else:
            fits = positions is not None and values is not None and _same_length(positions, values)
        if not fits:
            problems.append(f"the tensors of {name} do not have the shape {shape}")
        if (residual is None) != (bits is None) or (residual and bits and not _same_length(residual, bits)):
            problems.append(f"the residual of {name} is not a list of positions with as many bit patterns")
        if residual is not None and dense is None:
            problems.append(f"{name} has a residual and no delta")
        for part, entry in {"": dense, **parts}.items():
            if entry is not None and entry.dtype not in _DTYPES[part]:
                label = f"{name}:{part}" if part else name
                problems.append(f"{label} is {entry.dtype}, not {' or '.join(_DTYPES[part])}")
    both = sorted(set(metadata["unchanged"]) & metadata["parameters"].keys())
    problems += [f"{name} is changed and unchanged at once" for name in both]
    problems += [f"{name} belongs to no parameter" for name in entries if name not in expected]
    return problems[:MOST]


def _same_length(a: Entry, b: Entry) -> bool:
    return len(a.shape) == len(b.shape) == 1 and a.elements == b.elements
