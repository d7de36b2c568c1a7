"""Extraction: from contrasting examples to a validated steering vector."""

from __future__ import annotations

import contextlib
import math
import time
import warnings as warnings_module
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from probes.capture.activations import Pooled, Spread, activations
from probes.data import overlap
from probes.data.reading import Contrast
from probes.data.splits import folds
from probes.directions.calibration import Calibration, Contrasted, calibrate
from probes.directions.evidence import Evidence, evidence_of, evidence_of_others
from probes.directions.methods import method as find_method
from probes.directions.methods import scaled
from probes.directions.plan import Plan, plan
from probes.directions.recommendation import Recommendation, candidates, recommend
from probes.directions.validation import Validation, draw, validate
from probes.models.completions import Completion, completions_of
from probes.models.loading import LoadedModel, memory_reported
from probes.models.residual import blocks, context_length
from probes.models.tokens import choose
from vectors import references
from vectors.errors import ExampleError
from vectors.events import Event, OnEvent, ignore
from vectors.references import ModelSource
from vectors.registry.layers import spans
from vectors.steering import SteeringVector

FEW = 8  # examples of a class below which an interval means nothing
DOSE = 0.06  # of the residual stream's mean norm: the displacement with which a calibration begins
CALIBRATED_EXAMPLES = 16  # of each class, whose margin a calibration measures; chance chooses among 6 short ones
CALIBRATED_TOKENS = 400  # of these examples of a class in all, beyond the first
OUTLYING = 8.0  # a token whose norm is this many times the mean of its layer is warned of


class Extraction(NamedTuple):
    """A vector and what was measured on the way; `warnings` and `notes` are sentences for people."""

    vector: SteeringVector
    source: ModelSource  # the model that it was extracted from
    validated: dict[int, Validation]
    recommended: Recommendation
    calibration: Calibration | None
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
            "calibration": None if self.calibration is None else [each._asdict() for each in self.calibration.points],
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
    budget: float | None = None,
    planned: Plan | None = None,
    spread: Spread | None = None,
    on_event: OnEvent = ignore,
) -> Extraction:
    """Extract a steering vector at every layer asked for, validated on held-out folds.

    With a `budget` (nats, the 95th percentile of the KL divergence on neutral text) the recommended layer and strength
    are calibrated on generated text; without one they follow from the validation alone.

    `method` is a name of `probes.directions.methods`. `layers`, `which`, `truncate` and `match` are --layers, --tokens,
    --truncate and --match of the command line. `planned` is what `plan` makes of the same arguments, if it has been
    made; `spread` runs the passes over the examples elsewhere. Directions are float32 [hidden]; strength 1 is one mean
    displacement. Raises ExampleError, ModelError, UsageError.
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
        elsewhere = None if spread is None else spread(tokenised, wanted)
        pooled = activations(model, tokenised, wanted, elsewhere=elsewhere, on_event=on_event)
        with pooled.spill:
            draws = draw(labels, fold, seed, [example.group for example in both])
            directions, validated, projections = {}, {}, {}
            for position, layer in enumerate(wanted):
                on_event(Event("validating directions on held-out folds", position, len(wanted), "layers"))
                rows = pooled.spill.layer(position)
                evidence = evidence_of(chosen.NEEDS, rows, labels, contrast.paired)
                directions[layer] = scaled(chosen.direction(evidence), evidence).float()
                projections[layer] = _projection(directions[layer], evidence)
                validated[layer] = validate(chosen, rows, labels, fold, draws, paired=paired)
            calibrated = candidates(validated, len(blocks(model))) if budget is not None else []
            without_first: dict[int, torch.Tensor] = {}
            if int(fold.max()) > 0:
                for layer in calibrated:
                    rows = pooled.spill.layer(wanted.index(layer))
                    with contextlib.suppress(ExampleError):  # nothing tells the classes of the other folds apart
                        others = evidence_of_others(chosen.NEEDS, rows, labels, fold, paired)[0]
                        without_first[layer] = scaled(chosen.direction(others), others).float()

    norms = {layer: norm.mean for layer, norm in pooled.norms.items()}
    calibration: Calibration | None = None
    movable = [layer for layer in calibrated if float(directions[layer].norm()) > 0]
    if budget is not None and movable:
        held_out = {layer: without_first.get(layer, directions[layer]) for layer in movable} if without_first else {}
        first = {layer: DOSE * norms[layer] / float(directions[layer].norm()) or 1.0 for layer in movable}
        examples = _contrasted(loaded, contrast, fold[:half], fold[half:]) if held_out else Contrasted([], [])
        calibration = calibrate(
            loaded, {layer: directions[layer] for layer in movable}, held_out, examples, first,
            budget=budget, seed=seed, on_event=on_event,
        )  # fmt: skip
    recommended = recommend(validated, calibration, budget or 0.0)
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
        "measured": {str(i): {**_measured(validated[i]), "projection": projections[i]} for i in wanted},
        "recommended": recommended.value(),
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
        calibration,
        counts,
        token_counts,
        time.perf_counter() - started,
        (*contrast.notes, *([note] if note else [])),
        (*contrast.warnings, *warnings, *_warnings(counts, pooled)),
    )


def _projection(direction: torch.Tensor, evidence: Evidence) -> float:
    """The mean projection of both classes, each of the same weight, on a direction in units of strength; rounded."""
    square = float(direction.double() @ direction.double())
    mean = (evidence.positive.mean + evidence.negative.mean) / 2
    return round(float(mean @ direction.double()) / square, 4) if square > 0 else 0.0


def _contrasted(loaded: LoadedModel, contrast: Contrast, positive: torch.Tensor, negative: torch.Tensor) -> Contrasted:
    """A few completions of each class from the first fold, the shortest first: what a calibration measures."""
    limit = context_length(loaded.model.config)
    sides = []
    for examples, fold in ((contrast.positive, positive), (contrast.negative, negative)):
        held_out = [example for example, number in zip(examples, fold.tolist(), strict=True) if number == 0]
        completions = []
        for example in held_out:
            with contextlib.suppress(ExampleError), warnings_module.catch_warnings(action="ignore"):
                completions += completions_of([example], loaded.tokenizer, limit)
        completions.sort(key=lambda each: each.length)
        total = 0
        chosen: list[Completion] = []
        for completion in completions[:CALIBRATED_EXAMPLES]:
            total += completion.length
            if chosen and total > CALIBRATED_TOKENS:
                break
            chosen.append(completion)
        sides.append(chosen)
    return Contrasted(*sides)


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
