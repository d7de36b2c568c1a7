"""Extraction: from contrasting examples to a validated steering vector."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from probes.capture.activations import Pooled, activations
from probes.data import overlap
from probes.data.reading import Contrast
from probes.data.splits import folds
from probes.directions.evidence import evidence_of
from probes.directions.methods import method as find_method
from probes.directions.methods import scaled
from probes.directions.plan import Plan, plan
from probes.directions.recommendation import Recommendation, recommend
from probes.directions.validation import Validation, draw, validate
from probes.models.loading import LoadedModel, memory_reported
from probes.models.tokens import choose
from vectors import references
from vectors.events import Event, OnEvent, ignore
from vectors.references import ModelSource
from vectors.registry.layers import spans
from vectors.steering import SteeringVector

FEW = 8  # examples of a class below which an interval means nothing
OUTLYING = 8.0  # a token whose norm is this many times the mean of its layer is warned of


class Extraction(NamedTuple):
    """A vector and what was measured on the way; `warnings` and `notes` are sentences for people."""

    vector: SteeringVector
    source: ModelSource  # the model that it was extracted from
    validated: dict[int, Validation]
    recommended: Recommendation
    examples: dict[str, int]
    tokens: dict[str, int]
    seconds: float
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def report(self) -> dict[str, Any]:
        """What `steer extract --json` prints about the measurement."""
        return {
            "method": self.vector.metadata["method"]["name"],
            "layers": [
                {"layer": i, "norm": length, **_measured(self.validated[i])} for i, length in self.vector.norm().items()
            ],
            "recommended": self.recommended._asdict(),
            "examples": self.examples,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
        }


def extract(
    loaded: LoadedModel,
    contrast: Contrast,
    *,
    method: str = "diffmean",
    layers: str = "all",
    which: str = "completion",
    seed: int = 0,
    truncate: bool = False,
    match: str | None = None,
    planned: Plan | None = None,
    on_event: OnEvent = ignore,
) -> Extraction:
    """Extract a steering vector at every layer asked for, validated on held-out folds.

    `method` is a name of `probes.directions.methods`. `layers`, `which`, `truncate` and `match` are --layers, --tokens,
    --truncate and --match of the command line. `planned` is what `plan` makes of the same arguments, if it has been
    made. Directions are float32 [hidden]; strength 1 is one mean displacement. Raises ExampleError, ModelError,
    UsageError.
    """
    started = time.perf_counter()
    chosen = find_method(method)
    model = loaded.model
    wanted, tokenised, note, warnings, by_length = planned or plan(
        contrast, loaded.tokenizer, model.config, layers=layers, which=which, truncate=truncate, match=match
    )
    both = [*contrast.positive, *contrast.negative]
    labels = torch.arange(len(both)) < len(contrast.positive)
    fold = torch.cat(folds(contrast.positive, contrast.negative, seed, contrast.paired))
    half = len(contrast.positive)
    # Pairs stay pairs within each fold only when both sides of every pair fell into the same one.
    paired = contrast.paired and torch.equal(fold[:half], fold[half:])

    with memory_reported():
        pooled = activations(model, tokenised, wanted, on_event=on_event)
        with pooled.spill:
            draws = draw(labels, fold, seed)
            directions, validated = {}, {}
            for position, layer in enumerate(wanted):
                on_event(Event("validating directions on held-out folds", position, len(wanted), "layers"))
                rows = pooled.spill.layer(position)
                evidence = evidence_of(chosen.NEEDS, rows, labels, contrast.paired)
                directions[layer] = scaled(chosen.direction(evidence), evidence).float()
                validated[layer] = validate(chosen, rows, labels, fold, draws, paired=paired)

    norms = {layer: norm.mean for layer, norm in pooled.norms.items()}
    lengths = {layer: float(direction.norm()) for layer, direction in directions.items()}
    recommended = recommend(validated, lengths, norms)
    if by_length:
        recommended = recommended._replace(reason=f"{recommended.reason}; but {by_length}")
        warnings = (*warnings, f"{by_length}: compare with --match length, or --match position")
    counts = {"positive": half, "negative": len(both) - half}
    token_counts = {
        "positive": sum(len(t.counted) for t in tokenised[:half]),
        "negative": sum(len(t.counted) for t in tokenised[half:]),
        "computed": pooled.computed,
    }
    parameter = next(model.parameters())
    metadata: dict[str, Any] = {
        "base": loaded.identity,
        "method": {
            "name": method,
            "parameters": {
                "tokens": str(choose(which)),
                "layers": spans(wanted),
                "seed": seed,
                "truncate": truncate,
                **({} if match is None else {"match": match}),
                # The last bits of a direction follow from these two as well.
                "device": parameter.device.type,
                "dtype": str(parameter.dtype).removeprefix("torch."),
            },
        },
        "data": {
            "digests": contrast.digests,
            "examples": counts,
            "tokens": token_counts,
            **overlap.record([*contrast.positive, *contrast.negative]),
        },
        "measured": {str(i): _measured(validated[i]) for i in wanted},
        "recommended": recommended._asdict(),
        "apply": recommended.layers,
        "parents": [],
    }
    licence = references.licence(loaded.source)
    if licence:
        metadata["licence"] = licence
    return Extraction(
        SteeringVector(directions, metadata),
        loaded.source,
        validated,
        recommended,
        counts,
        token_counts,
        time.perf_counter() - started,
        (*contrast.notes, *([note] if note else [])),
        (*contrast.warnings, *warnings, *_warnings(counts, pooled)),
    )


def _measured(validation: Validation) -> dict[str, float | None]:
    """A validation as JSON values: rounded, since machines differ in the last bits, and None for NaN."""
    return {key: None if math.isnan(value) else round(value, 4) for key, value in validation._asdict().items()}


def _warnings(counts: dict[str, int], pooled: Pooled) -> Sequence[str]:
    warnings = []
    if min(counts.values()) < FEW:
        warnings.append(
            f"{counts['positive']} positive and {counts['negative']} negative examples: "
            f"with fewer than {FEW} of a class the interval is meaningless"
        )
    outlying = [layer for layer, norm in pooled.norms.items() if norm.largest > OUTLYING * norm.mean]
    if outlying:
        worst = max(outlying, key=lambda layer: pooled.norms[layer].largest / pooled.norms[layer].mean)
        ratio = pooled.norms[worst].largest / pooled.norms[worst].mean
        warnings.append(
            f"at layers {spans(outlying)} some token that counts has a norm up to {ratio:.0f} times the mean "
            f"(layer {worst}): it may dominate the vector there"
        )
    return warnings
