"""Inputs of a merge: model folders, hub ids, task vectors, LoRA adapters, and a model with an adapter applied.

Opening a source reads headers only. A source has a reader for each parameter, which gives either weights or a delta.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from merges.engine.floats import to_float32
from merges.engine.readers import Dense, LowRank, Reader, Sparse, Sum, Zero
from merges.inputs import adapters, bases
from vectors import references
from vectors.errors import ModelError, SteerError
from vectors.storage.files import digest_json
from vectors.task import TaskVector
from vectors.weights import FLOATS, Entry, entries_of, file_digest, mapped

HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")


@dataclass(eq=False)
class Source:
    """One opened input: a model, a task vector or an adapter."""

    reference: str  # as the user gave it
    kind: str  # model, task-vector or adapter
    path: Path
    files: tuple[Path, ...]
    entries: Mapping[str, Entry] = field(default_factory=dict)  # the parameters of a model
    vector: TaskVector | None = None
    adapter: adapters.Adapter | None = None
    model: references.ModelSource | None = None
    base: Source | None = None  # of an adapter

    @property
    def is_delta(self) -> bool:
        """Whether it holds deltas (a task vector or an adapter), not weights."""
        return self.kind != "model"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's configuration."""
        try:
            configuration = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{self.path / 'config.json'} is damaged: {error}", "fetch the model again") from error
        is_mapping = isinstance(configuration, dict) and isinstance(configuration.get("text_config") or {}, dict)
        names = (configuration.get("architectures") or []) if is_mapping else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ModelError(f"{self.path / 'config.json'} is not a model configuration", "fetch the model again")
        return configuration

    @cached_property
    def identity(self) -> str:
        """A digest of the content; for a model, of its configuration and samples of its weights."""
        if self.kind == "model":
            assert self.model is not None
            model_digest = references.identity(self.model)["digest"]
            return (
                model_digest
                if self.adapter is None
                else digest_json([model_digest, *map(file_digest, self.adapter.files)])
            )
        if self.vector is not None:
            return self.vector.identity
        return digest_json([file_digest(path) for path in self.files])

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters that can be merged, by name; for a delta, of those it changes."""
        if self.vector is not None:
            return self.vector.parameters
        if self.kind == "adapter":
            assert self.adapter is not None
            return {n: r.shape for n, r in (self.adapter.deltas | self.adapter.replaced).items()}
        return {name: entry.shape for name, entry in self.entries.items() if entry.dtype in FLOATS}

    @property
    def tied(self) -> bool:
        """Whether the output head is tied to the embedding, and therefore merged only once."""
        config = self.config.get("text_config") or self.config
        return bool(self.config.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))

    def reader(self, name: str, shape: tuple[int, ...]) -> tuple[Reader, bool]:
        """The reader of one parameter of this shape, and whether it gives a delta."""
        if self.kind == "model":
            dense: Reader = Dense(self.entries[name])
            if self.adapter is not None:
                if name in self.adapter.replaced:
                    return self.adapter.replaced[name], False
                if name in self.adapter.deltas:
                    return Sum(dense, self.adapter.deltas[name]), False
            return dense, False
        if self.adapter is not None:
            if name in self.adapter.replaced:
                return self.adapter.replaced[name], False
            return self.adapter.deltas.get(name, Zero(shape)), True
        assert self.vector is not None
        return _vector_reader(self.vector, name, shape), True

    def changes(self, name: str) -> bool:
        """Whether this input may change a parameter; models always may."""
        return self.kind == "model" or name in self.shapes


def _vector_reader(vector: TaskVector, name: str, shape: tuple[int, ...]) -> Reader:
    if name in vector.entries:
        return Dense(vector.entries[name])
    up, positions = vector.part(name, "up"), vector.part(name, "positions")
    if up is not None:
        down = vector.entries[f"{name}:down"]
        left, right = (to_float32(mapped(e), e.dtype).reshape(e.shape) for e in (up, down))
        return LowRank(left, right)
    if positions is not None:
        return Sparse(shape, vector.positions(name, "positions"), mapped(vector.entries[f"{name}:values"]))
    return Zero(shape)


def open_source(reference: str, base: Source | None = None) -> Source:
    """Open an input: a path to a vector, a folder, a hub id, `smollm2`, or `MODEL+ADAPTER`. Raises SteerError.

    An adapter needs `base`, whose parameters it changes.
    """
    path = Path(os.path.expanduser(reference))
    if os.path.isdir(path) and adapters.is_adapter(path):
        if base is None:
            raise ModelError(f"the base model of the adapter {reference} is not known", "name it: --base MODEL")
        adapter = adapters.read(path, base.shapes)
        return Source(reference, "adapter", path, adapter.files, adapter=adapter, base=base)
    if os.path.isfile(path) or os.path.isfile(f"{path}.index.json"):
        vector = TaskVector.open(path)
        return Source(reference, "task-vector", path, vector.files, vector=vector)
    if "+" in reference and not os.path.exists(path):
        model, _, extra = reference.partition("+")
        below = open_source(model)
        adapter = adapters.read(Path(os.path.expanduser(extra)), below.shapes)
        files = (*below.files, *adapter.files)
        return Source(reference, "model", below.path, files, below.entries, adapter=adapter, model=below.model)
    model_source = references.resolve(reference)
    files = tuple(references.weight_files(model_source.path))
    if not files:
        raise ModelError(f"{reference} has no safetensors weights", "save the model as safetensors")
    missing = [f"{reference} lacks its shard {file.name}" for file in files if not file.is_file()]
    if missing:
        raise ModelError(missing, "fetch the model again")
    source = Source(reference, "model", model_source.path, files, entries_of(files), model=model_source)
    if not source.entries:
        raise ModelError(f"{reference} holds no tensors", "fetch the model again")
    _require_index(source)
    if source.tied:
        # Some files also store the tied head, which is merged as the embedding.
        tied = {name for name in HEADS if name in source.entries and any("embed" in n for n in source.entries)}
        source.entries = {name: entry for name, entry in source.entries.items() if name not in tied}
    return source


def _require_index(source: Source) -> None:
    """Check that the shards hold the tensors that the index lists. Raises ModelError."""
    index = source.path / "model.safetensors.index.json"
    if not index.is_file() or (source.path / "model.safetensors").is_file():
        return
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    problems = [
        f"{source.reference}: {file} lacks {name}" for name, file in weight_map.items() if name not in source.entries
    ]
    if problems:
        raise ModelError(problems, "fetch the model again")


def open_all(references_: list[str], base: str | None) -> tuple[list[Source], Source | None]:
    """Open all inputs and the base, by default the one that they record. Raises ModelError with all problems."""
    problems: list[str] = []
    hints: list[str] = []

    def attempt(reference: str, below: Source | None = None) -> Source | None:
        try:
            return open_source(reference, below)
        except SteerError as error:
            problems.extend(error.problems)
            hints.append(error.hint)
            return None

    opened = attempt(base) if base else None
    sources: list[Source] = []
    for reference in references_:
        path = Path(os.path.expanduser(reference))
        if opened is None and base is None and os.path.isdir(path) and adapters.is_adapter(path):
            base_reference = json.loads((path / adapters.CONFIG).read_text(encoding="utf-8")).get(
                "base_model_name_or_path"
            )
            opened = attempt(base_reference) if base_reference else None
        source = attempt(reference, opened) if not (base and opened is None and adapters.is_adapter(path)) else None
        if source is not None:
            sources.append(source)
            if opened is None and base is None and source.vector is not None:
                recorded_base = source.vector.base
                base_reference = bases.recall(recorded_base)
                opened = attempt(base_reference) if base_reference else None
                if base_reference is None:
                    problems.append(f"the location of the base of {reference} is not known: {recorded_base['digest']}")
                    hints.append("name it: --base MODEL")
    if problems:
        raise ModelError(list(dict.fromkeys(problems)), "; ".join(dict.fromkeys(h for h in hints if h)))
    return sources, opened
