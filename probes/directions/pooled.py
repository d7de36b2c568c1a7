"""Directions of several methods and of subsets of the examples, which go through the model once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from probes.capture.activations import Pooled, Spread, activations
from probes.capture.spill import Spill
from probes.data.reading import Contrast
from probes.directions.evidence import Rows, evidence_of, piece
from probes.directions.methods import method as find_method
from probes.directions.methods import scaled
from probes.directions.plan import Plan
from probes.models.loading import LoadedModel, memory_reported
from vectors.events import OnEvent, ignore


class Examples:
    """The pooled activations of a contrast; a class because they stay open while directions are made of them."""

    def __init__(self, spill: Spill, pooled: Pooled, contrast: Contrast) -> None:
        self.spill, self.layers, self.norms = spill, pooled.layers, pooled.norms
        self.positives, self.count = len(contrast.positive), len(contrast.positive) + len(contrast.negative)
        self.paired = contrast.paired

    def direction(self, method: str, layer: int, chosen: Sequence[int] | None = None) -> Tensor:
        """The direction of a method at a layer, float32 [hidden], at which strength 1 is one mean displacement.

        `chosen` are numbers of examples, the positive ones first and of pairs both, in order; None takes all. Raises
        ExampleError where they give no direction.
        """
        rows: Rows = self.spill.layer(self.layers.index(layer))
        labels = torch.arange(self.count) < self.positives
        if chosen is not None:
            index = torch.tensor(chosen)
            rows, labels = piece(rows, 0, self.count)[index].float(), labels[index]
        found = find_method(method)
        evidence = evidence_of(found.NEEDS, rows, labels, self.paired)
        return scaled(found.direction(evidence), evidence).float()


@contextlib.contextmanager
def pooled_examples(
    loaded: LoadedModel,
    contrast: Contrast,
    planned: Plan,
    *,
    spread: Spread | None = None,
    on_event: OnEvent = ignore,
) -> Iterator[Examples]:
    """The examples of a contrast through the model once, at the layers of `planned`, which is its `plan`.

    `spread` runs the passes elsewhere.
    """
    with memory_reported():
        elsewhere = None if spread is None else spread(planned.tokens, planned.layers)
        pooled = activations(loaded.model, planned.tokens, planned.layers, elsewhere=elsewhere, on_event=on_event)
        with pooled.spill as spill:
            yield Examples(spill, pooled, contrast)
