"""Vectors re-extracted from shuffled labels: what the same method makes of the same texts without the behaviour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probes.capture.activations import activations
from probes.controls import shuffles
from probes.data.reading import Contrast
from probes.directions.evidence import evidence_of
from probes.directions.methods import method as find_method
from probes.directions.methods import scaled
from probes.directions.plan import plan
from probes.models.loading import LoadedModel, memory_reported
from vectors.errors import ExampleError
from vectors.events import OnEvent, ignore
from vectors.registry.layers import spans


def shuffled_directions(
    loaded: LoadedModel,
    contrast: Contrast,
    layers: Sequence[int],
    *,
    count: int,
    method: str = "diffmean",
    tokens: str = "completion",
    match: str | None = None,
    seed: int = 0,
    on_event: OnEvent = ignore,
) -> list[dict[int, Tensor]]:
    """`count` extractions with independently shuffled labels: the direction, float32 [hidden], by layer.

    Each direction has strength 1 for the shuffled classes, so it is far shorter than that of a behaviour. The texts go
    through the model once. Raises as `probes.directions.extraction.extract` does.
    """
    chosen = find_method(method)
    planned = plan(
        contrast, loaded.tokenizer, loaded.model.config, layers=spans(layers), which=tokens, truncate=True, match=match
    )
    examples = len(contrast.positive) + len(contrast.negative)
    labels = torch.arange(examples) < len(contrast.positive)
    drawn = shuffles(labels, torch.zeros(examples, dtype=torch.int64), seed, count)
    results: list[dict[int, Tensor]] = [{} for _ in drawn]
    with memory_reported():
        pooled = activations(loaded.model, planned.tokens, planned.layers, on_event=on_event)
        with pooled.spill:
            for position, layer in enumerate(planned.layers):
                rows: Any = pooled.spill.layer(position)
                for result, shuffled in zip(results, drawn, strict=True):
                    # Shuffling breaks the pairs too.
                    evidence = evidence_of(chosen.NEEDS, rows, shuffled, False)
                    try:
                        result[layer] = scaled(chosen.direction(evidence), evidence).float()
                    except ExampleError:  # the shuffled classes have the same mean
                        result[layer] = torch.zeros(rows.shape[1])
    return results
