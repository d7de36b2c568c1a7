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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from merges.inputs.decoder import Decoder
from merges.recipes.recipe import Slice

AFTER = re.compile(r"(^|\.)(norm|final_layernorm|final_layer_norm|ln_f|lm_head|embed_out|output|norm_f)\.")


class StackedTensor(NamedTuple):
    """A tensor of the result: its name in each source, by model reference, and the options of its slice."""

    name: str
    sources: dict[str, str]
    options: dict[str, dict[str, Any]]  # by model reference
    shared: dict[str, Any]  # the parameters of the slice
    base: str | None  # the base of the slice
    position: float  # in the slice, from 0 at its first layer to 1 at its last, along which gradients are interpolated


class Model(NamedTuple):
    """The names of a model's parameters, and where the layers of its decoder are."""

    names: tuple[str, ...]
    decoder: Decoder


def problems_of_slices(slices: Sequence[Slice], models: Mapping[str, Model]) -> list[str]:
    """What is wrong with slices of models, given by their references."""
    problems = [
        f"{reference} has several stacks of layers, and none of them is the decoder's alone: it can't be sliced"
        for reference, model in models.items()
        if model.decoder.several
    ]
    for number, entry in enumerate(slices, 1):
        lengths = {source.layers[1] - source.layers[0] for source in entry.sources}
        if len(lengths) != 1:
            problems.append(f"the sources of slice {number} have different numbers of layers: {sorted(lengths)}")
        for source in entry.sources:
            model = models.get(source.model)
            if model is not None and source.layers[1] > model.decoder.depth:
                problems.append(
                    f"slice {number} uses layers up to {source.layers[1] - 1} of {source.model}, whose decoder has "
                    f"{model.decoder.depth}"
                )
    return problems


def stacked_tensors(slices: Sequence[Slice], models: Mapping[str, Model]) -> list[StackedTensor]:
    """Every tensor of the stacked model, from the models by their references.

    Only the text decoder's layers are stacked. Those of other towers stay as they are; those of multi-token
    prediction, which follow the decoder's under the same prefix, keep their distance from its end.
    """
    stacked: list[StackedTensor] = []
    depth, done = sum(entry.sources[0].layers[1] - entry.sources[0].layers[0] for entry in slices), 0
    for number, entry in enumerate(slices):
        sources = entry.sources
        options = {source.model: dict(source.parameters or {}) for source in sources}
        shared = dict(entry.parameters or {})
        first = sources[0]
        model = models[first.model]
        count = first.layers[1] - first.layers[0]

        def stack(
            name: str, names: dict[str, str], position: float, entry: Slice = entry,
            options: dict[str, dict[str, Any]] = options, shared: dict[str, Any] = shared,
        ) -> None:  # fmt: skip
            stacked.append(StackedTensor(name, names, options, shared, entry.base, position))

        by_layer: dict[int, list[str]] = {}
        for name in model.names:
            split = model.decoder.split(name)
            if split is not None:
                by_layer.setdefault(split[0], []).append(split[1])
        for offset in range(count):
            position = offset / (count - 1) if count > 1 else 1.0
            for after in by_layer.get(first.layers[0] + offset, ()):
                names = {s.model: f"{models[s.model].decoder.prefix}{s.layers[0] + offset}{after}" for s in sources}
                stack(f"{model.decoder.prefix}{done + offset}{after}", names, position)
        done += count
        edge = number == 0, number == len(slices) - 1
        for name in model.names:
            split = model.decoder.split(name)
            if split is None and edge[1 if AFTER.search(name) else 0]:
                stack(name, {s.model: name for s in sources}, 0.0)
            elif split is not None and split[0] >= model.decoder.depth and edge[1]:
                beyond = split[0] - model.decoder.depth
                names = {
                    s.model: f"{models[s.model].decoder.prefix}{models[s.model].decoder.depth + beyond}{split[1]}"
                    for s in sources
                }
                stack(f"{model.decoder.prefix}{depth + beyond}{split[1]}", names, 0.0)
    return stacked
