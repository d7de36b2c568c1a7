"""Layers of different models stacked into a new one (a "frankenmerge"), merged where a slice has several sources.

    slices:
      - sources: [{model: A, layers: [0, 16]}]                      # layers 0 to 15 of A
      - sources:                                                    # then 8 to 23 of A and B, merged
          - {model: A, layers: [8, 24]}
          - {model: B, layers: [8, 24], parameters: {weight: 0.5}}

A method on deltas takes them against the recipe's base, or against the slice's, `base: MODEL` beside `sources`. If the
base is listed as a source too, that selects which of its layers is subtracted. Parameters before the layers come from
the first slice, those after them from the last. A gradient runs over the layers of its slice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from merges.recipes.recipe import Slice

LAYER = re.compile(r"(?P<before>(?:^|.*\.)(?:layers|layer|h|blocks|block)\.)(?P<index>\d+)(?P<after>\..+)")
AFTER = re.compile(r"(^|\.)(norm|final_layernorm|final_layer_norm|ln_f|lm_head|embed_out|output|norm_f)\.")


class StackedTensor(NamedTuple):
    """A tensor of the result: its name in each source, by model reference, and the options of its slice."""

    name: str
    sources: dict[str, str]
    options: dict[str, dict[str, Any]]  # by model reference
    shared: dict[str, Any]  # the parameters of the slice
    base: str | None  # the base of the slice
    position: float  # in the slice, from 0 at its first layer to 1 at its last, along which gradients are interpolated


def layer_of(name: str) -> int | None:
    """The layer that a parameter belongs to, counted from 0, or None."""
    match = LAYER.fullmatch(name)
    return int(match["index"]) if match else None


def layers(names: Iterable[str]) -> int:
    """The number of layers of a model, from the names of its parameters."""
    return 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=-1)


def problems_of_slices(slices: Sequence[Slice], depth: Mapping[str, int]) -> list[str]:
    """What is wrong with slices of models; `depth` is the number of layers of each, by its reference."""
    problems = []
    for number, entry in enumerate(slices, 1):
        lengths = {source.layers[1] - source.layers[0] for source in entry.sources}
        if len(lengths) != 1:
            problems.append(f"the sources of slice {number} have different numbers of layers: {sorted(lengths)}")
        for source in entry.sources:
            have = depth.get(source.model)
            if have is not None and source.layers[1] > have:
                problems.append(
                    f"slice {number} uses layers up to {source.layers[1] - 1} of {source.model}, which has {have}"
                )
    return problems


def stacked_tensors(slices: Sequence[Slice], names: Mapping[str, Sequence[str]]) -> list[StackedTensor]:
    """Every tensor of the stacked model. `names` are the parameters of each model, by its reference."""
    stacked: list[StackedTensor] = []
    done = 0
    for number, entry in enumerate(slices):
        sources = entry.sources
        options = {source.model: dict(source.parameters or {}) for source in sources}
        shared = dict(entry.parameters or {})
        first, base = sources[0], entry.base
        count = first.layers[1] - first.layers[0]
        for offset in range(count):
            position = offset / (count - 1) if count > 1 else 1.0
            for name in names[first.model]:
                match = LAYER.fullmatch(name)
                if match is None or int(match["index"]) != first.layers[0] + offset:
                    continue
                names_in_sources = {
                    s.model: f"{match['before']}{s.layers[0] + offset}{match['after']}" for s in sources
                }
                result_name = f"{match['before']}{done + offset}{match['after']}"
                stacked.append(StackedTensor(result_name, names_in_sources, options, shared, base, position))
        done += count
        edge = number == 0, number == len(slices) - 1
        for name in names[first.model]:
            if layer_of(name) is None and edge[1 if AFTER.search(name) else 0]:
                stacked.append(StackedTensor(name, {s.model: name for s in sources}, options, shared, base, 0.0))
    return stacked


def stacked_config(config: Mapping[str, Any], slices: Sequence[Slice], main: str) -> dict[str, Any]:
    """The configuration of the stacked model, from that of `main`: the depth, and lists by layer."""
    chosen = [
        layer
        for entry in slices
        for source in [next((s for s in entry.sources if s.model == main), entry.sources[0])]
        for layer in range(*source.layers)
    ]
    changed = dict(config)
    text = dict(changed["text_config"]) if "text_config" in changed else changed
    before = text.get("num_hidden_layers") or text.get("n_layer")
    for key in ("num_hidden_layers", "n_layer"):
        if key in text:
            text[key] = len(chosen)
    for key, value in text.items():
        if isinstance(value, list) and len(value) == before and max(chosen) < len(value):
            text[key] = [value[layer] for layer in chosen]
    if "max_window_layers" in text:
        text["max_window_layers"] = min(text["max_window_layers"], len(chosen))
    if "text_config" in changed:
        changed["text_config"] = text
    return changed
