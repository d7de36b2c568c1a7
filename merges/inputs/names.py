"""The names of a model's parameters in memory, from transformers' own tables.

A checkpoint may name a parameter otherwise than the model in memory does: Gemma 3 on the hub has
`language_model.model.layers.0...` where transformers since 4.52 has `model.language_model.layers.0...` in memory, which
some trainers save, and after which PEFT names adapters. Experts may lie one by one in files and fused in memory.
transformers converts when it loads; the same tables (`transformers.conversion_mapping`) give each name its name in
memory here. Importing transformers takes seconds, so this is used only where plain names do not match.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(eq=False)
class Part:
    """One tensor of a file that becomes a part of a parameter in memory."""

    name: str  # in the file
    pattern: int  # which of the converter's sources it is


@dataclass(eq=False)
class Skeleton:
    """A model on torch's meta device (names and shapes, no numbers), and transformers' rules for names in files."""

    model: Any
    shapes: Mapping[str, tuple[int, ...]]  # of its parameters and buffers
    renamings: list[Any]
    converters: list[Any]

    def name(self, name: str) -> str:
        """The name in memory of a tensor in a file; experts that are fused in memory keep names of their own."""
        renamed, _ = self._renamed(name)
        return renamed

    def fused(self, names: Iterable[str]) -> dict[str, tuple[list[Part], list[Any]]]:
        """For each parameter in memory that is made of several tensors: these, and the operations that make it."""
        groups: dict[str, tuple[list[Part], list[Any]]] = {}
        for name in sorted(names, key=_natural):
            _, target = self._renamed(name)
            if target is not None:
                whole, converter, pattern = target
                parts, _ = groups.setdefault(whole, ([], list(converter.operations)))
                parts.append(Part(name, converter.source_patterns.index(pattern)))
        return groups

    def _renamed(self, name: str) -> tuple[str, tuple[str, Any, str] | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        whole, pattern = rename_source_key(name, self.renamings, self.converters, prefix, self.shapes)
        if pattern is None:
            return whole, None
        alone, _ = rename_source_key(name, self.renamings, [])
        plain, _ = rename_source_key(name, self.renamings, self.converters)
        if whole == f"{prefix}.{plain}":
            alone = f"{prefix}.{alone}"
        elif plain == f"{prefix}.{whole}":
            alone = alone.removeprefix(f"{prefix}.")
        converter = next(c for c in self.converters if pattern in c.source_patterns)
        return alone, (whole, converter, pattern)


@functools.lru_cache(maxsize=8)
def skeleton(folder: Path, architecture: str) -> Skeleton | None:
    """The skeleton of the model in a folder; None where transformers does not know it."""
    try:
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        from merges.inputs.defaults import configuration

        kind = getattr(transformers, architecture)
        with torch.device("meta"):
            model = kind(configuration(folder))
        mapping = get_model_conversion_mapping(model)
    except Exception:  # remote code, an unknown architecture, a configuration that its class refuses
        return None
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return Skeleton(model, shapes, renamings, converters)


def matched(
    names: Iterable[str], theirs: Skeleton | None, wanted: Iterable[str], ours: Skeleton | None
) -> dict[str, str]:
    """For each of `wanted` (names of one checkpoint) the name of the same parameter among `names` (of another)."""
    if theirs is None or ours is None:
        return {}
    by_memory = {theirs.name(name): name for name in names}
    return {name: by_memory[memory] for name in wanted if (memory := ours.name(name)) in by_memory}


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
