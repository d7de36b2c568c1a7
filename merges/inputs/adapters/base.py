"""The base model of an adapter: its parameters, by every name that an adapter file may use for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from merges.engine.floats import MERGEABLE
from merges.inputs import names
from merges.inputs.decoder import in_tower
from merges.inputs.heads import embedding_of, is_head
from vectors.weights import Entry

# Architectures whose linear layers are transformers' Conv1D, which keeps its weight transposed, and these layers.
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(eq=False)
class Base:
    """A base model: its folder, configuration and parameters, and whether its head is its embedding."""

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    tied: bool

    @cached_property
    def skeleton(self) -> names.Skeleton | None:
        """The model in memory, from transformers' tables; takes seconds, so only where plain names do not match."""
        return names.skeleton(self.folder, str((self.config.get("architectures") or [""])[0]))

    @cached_property
    def _by_memory(self) -> dict[str, str]:
        skeleton = self.skeleton
        return {} if skeleton is None else {skeleton.name(name): name for name in self.entries}

    @cached_property
    def _by_end(self) -> dict[str, list[str]]:
        """The parameters by what follows each dot of their names."""
        ends: dict[str, list[str]] = {}
        for name in self.entries:
            _, _, rest = name.partition(".")
            while rest:
                ends.setdefault(rest, []).append(name)
                _, _, rest = rest.partition(".")
        return ends

    def parameter(self, name: str) -> str | None:
        """The parameter that an adapter calls `name`; None where the base has no such parameter.

        `name` may be the name in the files, have one outer module more or less (`transformer.h.0` for `h.0`), or be the
        name in memory.
        """
        if name in self.entries:
            return name
        outer, _, short = name.partition(".")
        if short in self.entries and not in_tower(outer):
            return short
        longer = [candidate for candidate in self._by_end.get(name, ()) if not in_tower(candidate.removesuffix(name))]
        if len(longer) == 1:
            return longer[0]
        if longer or self.skeleton is None:
            return None
        return self._by_memory.get(name) or self._by_memory.get(self.skeleton.name(name))

    def is_tied_head(self, name: str) -> bool:
        """Whether an adapter's name for a parameter is that of a head that is the embedding."""
        return self.tied and is_head(name) and not any(map(is_head, self.entries))

    @property
    def embedding(self) -> str | None:
        """The parameter that embeds tokens; None where there is none or several."""
        return embedding_of(self.entries)

    def transposed(self, parameter: str, shape: tuple[int, int]) -> bool:
        """Whether a linear layer keeps its weight transposed, from the shape [outputs, inputs] of an adapter's product.

        PEFT sets its `fan_in_fan_out` for each layer by the layer's class; what it saves is that of the last layer.
        """
        stored = self.entries[parameter].shape
        if shape[0] != shape[1]:
            return stored == (shape[1], shape[0])
        kind = self.config.get("model_type")
        return kind in _CONV1D and parameter.removesuffix(".weight").rpartition(".")[2] in _CONV1D_LAYERS

    def merges(self, parameter: str) -> bool:
        """Whether a parameter is floating-point of a dtype that can be merged."""
        return self.entries[parameter].dtype in MERGEABLE
