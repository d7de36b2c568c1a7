"""Inputs of a merge: model folders, hub ids, task vectors, LoRA adapters, and a model with an adapter applied.

Opening a source reads headers only. A source has a reader for each parameter, which gives either weights or a delta.
"""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from merges.engine.floats import MERGEABLE, to_float32
from merges.engine.readers import Dense, LowRank, Reader, Sparse, Sum, Zero
from merges.inputs import bases, checkpoints, heads, locations
from merges.inputs.adapters import folder as adapters
from merges.inputs.adapters.base import Base
from vectors import references
from vectors.documents.json_text import read_object
from vectors.errors import ModelError, SteerError
from vectors.storage.files import digest_json
from vectors.task import TaskVector
from vectors.weights import Entry, file_digest, mapped


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
        configuration = read_object(self.path / "config.json", ModelError, "fetch the model again")
        is_valid = isinstance(configuration.get("text_config") or {}, dict)
        names = (configuration.get("architectures") or []) if is_valid else None
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
            return {n: r.shape for n, r in (self.adapter.deltas | self.adapter.weights).items()}
        return {name: entry.shape for name, entry in self.entries.items() if entry.dtype in MERGEABLE}

    @cached_property
    def tied(self) -> bool:
        """Whether the output head is tied to the embedding, and therefore merged only once."""
        return heads.is_tied(self.path, self.config, self.entries)

    @cached_property
    def as_base(self) -> Base:
        """The model as the base of an adapter."""
        return Base(self.path, self.config, self.entries, self.tied)

    def take_names(self, new: Mapping[str, str]) -> None:
        """Rename parameters; `new` maps names in the files to new ones."""
        self.entries = {new.get(name, name): entry for name, entry in self.entries.items()}
        if self.adapter is not None:
            deltas, weights = (
                {new.get(name, name): reader for name, reader in readers.items()}
                for readers in (self.adapter.deltas, self.adapter.weights)
            )
            self.adapter = self.adapter._replace(deltas=deltas, weights=weights)

    def reader(self, name: str, shape: tuple[int, ...]) -> tuple[Reader, bool]:
        """The reader of one parameter of this shape, and whether it gives a delta."""
        if self.kind == "model":
            dense: Reader = Dense(self.entries[name])
            if self.adapter is not None:
                if name in self.adapter.weights:
                    return self.adapter.weights[name], False
                if name in self.adapter.deltas:
                    return Sum(dense, self.adapter.deltas[name]), False
            return dense, False
        if self.adapter is not None:
            if name in self.adapter.weights:
                return self.adapter.weights[name], False
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
    path = locations.path_of(reference)
    if os.path.isfile(path) or os.path.isfile(f"{path}.index.json"):
        vector = TaskVector.open(path)
        return Source(reference, "task-vector", path, vector.files, vector=vector)
    pair = locations.model_and_adapter(reference)
    if pair is not None:
        return _with_adapter(reference, *pair)
    folder = locations.adapter(reference)
    if folder is not None:
        if base is None:
            raise ModelError(f"the base model of the adapter {reference} is not known", "name it: --base MODEL")
        adapter = adapters.read(folder, base.as_base)
        return Source(reference, "adapter", folder, adapter.files, adapter=adapter, base=base)
    model = references.resolve(reference)
    source = Source(reference, "model", model.path, (), model=model)
    source.files, source.entries = checkpoints.read(reference, model.path, source.config)
    if source.tied:
        source.entries = heads.without_tied_head(reference, source.entries)
    return source


def _with_adapter(reference: str, model: str, extra: str) -> Source:
    base_model = open_source(model)
    if base_model.kind != "model" or base_model.adapter is not None:
        raise ModelError(f"{model} is not a plain model, so {extra} can't be put on it", "put one adapter on a model")
    folder = locations.adapter(extra)
    if folder is None:
        raise ModelError(
            f"{extra} is not an adapter: there is no such folder with {adapters.CONFIG}, here or on the hub",
            "MODEL+ADAPTER names a model and the folder, or the hub id, of an adapter",
        )
    adapter = adapters.read(folder, base_model.as_base)
    files = (*base_model.files, *adapter.files)
    return Source(
        reference, "model", base_model.path, files, base_model.entries, adapter=adapter, model=base_model.model
    )


def open_all(references_: list[str], base: str | None) -> tuple[list[Source | None], Source | None, list[SteerError]]:
    """Open all inputs and the base, by default the one that they record.

    Also returns the error with every problem of those that can't be opened, which are None, if there are any.
    """
    problems: list[str] = []
    hints: list[str] = []

    def attempt(reference: str, base_model: Source | None = None) -> Source | None:
        try:
            return open_source(reference, base_model)
        except SteerError as error:
            problems.extend(error.problems)
            hints.append(error.hint)
            return None

    opened = attempt(base) if base else None
    sources: list[Source | None] = []
    for reference in references_:
        sources.append(None)
        base_model = opened
        if opened is None and base is None:
            try:
                recorded = _recorded_base(reference)
            except SteerError as error:
                problems.extend(error.problems)
                hints.append(error.hint)
                continue
            base_model = opened = attempt(recorded) if recorded else None
            if recorded and base_model is None:
                problems.append(f"{reference} names {recorded} as its base, which can't be opened")
                hints.append("name its base: --base MODEL")
                continue
        if base and opened is None and locations.adapter(reference) is not None:
            continue  # the base is reported already
        sources[-1] = attempt(reference, base_model)
    if not problems:
        return sources, opened, []
    hint = "; ".join(dict.fromkeys(h for h in hints if h))
    return sources, opened, [ModelError(list(dict.fromkeys(problems)), hint)]


def _recorded_base(reference: str) -> str | None:
    """The base that an adapter or a task vector names; None for a model. Raises SteerError."""
    path = locations.path_of(reference)
    if os.path.isfile(path) or os.path.isfile(f"{path}.index.json"):
        recorded = TaskVector.open(path).base
        location = bases.recall(recorded)
        if location is None:
            raise ModelError(
                f"the location of the base of {reference} is not known: {recorded['digest']}", "name it: --base MODEL"
            )
        return location
    if locations.model_and_adapter(reference) is not None:
        return None
    folder = locations.adapter(reference)
    return None if folder is None else adapters.base_name(folder)
