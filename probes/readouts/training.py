"""Training a probe: from contrasting examples to readouts at every layer, with held-out figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.data import overlap
from probes.data.reading import Contrast
from probes.data.splits import folds
from probes.intervals import draw_resamples
from probes.models import residual
from probes.models.loading import LoadedModel, memory_reported
from probes.models.tokens import Tokens
from probes.readouts.calibration import Bin, curve
from probes.readouts.figures import Figures, figures
from probes.readouts.fitting import Units, fit
from probes.readouts.methods import method as find_method
from probes.readouts.rows import Measured, States, mean_residuals, measured, residual_states
from probes.readouts.scoring import Pool
from vectors import references
from vectors.documents.artifacts import RESIDUAL
from vectors.errors import ExampleError
from vectors.events import Event, OnEvent, ignore
from vectors.probe import Probe, Readout
from vectors.registry.layers import spans

FEW = 8  # examples of a class below which an interval means nothing


class Settings(NamedTuple):
    """How a probe is trained: what `steer probe train` takes.

    `tokens` are those that count. With `per_token` each of them is an example of its own, else their mean is. `pool` is
    how the score of a text follows from those of its tokens.
    """

    method: str = "logistic"
    tokens: str = "completion"
    per_token: bool = False
    pool: Pool = "mean"
    seed: int = 0
    truncate: bool = False
    site: str = RESIDUAL


class Trained(NamedTuple):
    """A probe and its held-out figures by layer; `curve` is the calibration of the recommended layer."""

    probe: Probe
    figures: dict[int, Figures]
    curve: list[Bin]
    examples: dict[str, int]
    seconds: float
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def report(self) -> dict[str, Any]:
        """What `steer probe train --json` prints about the measurement."""
        return {
            "method": self.probe.metadata["method"]["name"],
            "site": self.probe.site,
            "layers": [{"layer": i, **each.numbers()} for i, each in self.figures.items()],
            "recommended": self.probe.metadata["recommended"],
            "calibration": [each._asdict() for each in self.curve],
            "examples": self.examples,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
        }


def train(
    loaded: LoadedModel,
    contrast: Contrast,
    texts: Sequence[Tokens],
    layers: Sequence[int],
    settings: Settings,
    *,
    states: States | None = None,
    on_event: OnEvent = ignore,
) -> Trained:
    """Fit a readout at each of `layers`, calibrate it, and measure it on held-out folds.

    `texts` are the tokens of the positive, then of the negative examples. `states` are the activations of another site
    than the output of blocks. Examples with the same context or text, and pairs, stay in one fold.

    Raises ExampleError where no layer tells the classes apart, ModelError, UsageError.
    """
    started = time.perf_counter()
    method = find_method(settings.method)
    both = [*contrast.positive, *contrast.negative]
    labels = torch.arange(len(both)) < len(contrast.positive)
    fold = torch.cat(folds(contrast.positive, contrast.negative, settings.seed, contrast.paired))
    groups = [example.group for example in both]
    resamples = draw_resamples(labels, settings.seed, groups)
    readouts: dict[int, Readout] = {}
    found: dict[int, Figures] = {}
    scores: dict[int, Tensor] = {}
    with memory_reported():
        rows = _rows(loaded, texts, layers, settings, states, on_event)
        with rows.spill:
            units = Units(rows.owner, labels, fold)
            for position, layer in enumerate(layers):
                on_event(Event("fitting readouts on held-out folds", position, len(layers), "layers"))
                fitted = fit(method, rows.spill.layer(position), units, settings.pool)
                if fitted is not None:
                    readouts[layer], scores[layer] = fitted
                    found[layer] = figures(fitted.held_out, labels, 0.0, resamples, groups)
    if not readouts:
        raise ExampleError(
            f"the activations of both classes are the same at layer {spans(layers)}, so there is nothing to read",
            "count other tokens (--tokens), or check that the two files differ",
        )
    recommended = recommend(found)
    counts = {"positive": len(contrast.positive), "negative": len(contrast.negative)}
    probe = Probe(readouts, _metadata(loaded, contrast, settings, found, recommended, counts))
    return Trained(
        probe,
        found,
        curve(scores[recommended["layer"]], labels) if int(fold.max()) else [],
        counts,
        time.perf_counter() - started,
        contrast.notes,
        (*contrast.warnings, *_warnings(counts, [i for i in layers if i not in readouts])),
    )


def recommend(found: dict[int, Figures]) -> dict[str, Any]:
    """The layer with the least held-out cross-entropy, which AUROC alone would not tell from its neighbours."""
    layers = sorted(found, key=lambda i: (_last_if_nan(found[i].cross_entropy), i))
    best = found[layers[0]]
    if best.cross_entropy != best.cross_entropy:
        middle = sorted(found)[len(found) // 2]
        return {"layer": middle, "reason": "the middle layer, since nothing was held out"}
    reason = (
        f"the least held-out cross-entropy, {best.cross_entropy:.3f} nats (AUROC {best.auroc:.3f}, "
        f"95 % interval {best.auroc_low:.3f} to {best.auroc_high:.3f})"
    )
    return {"layer": layers[0], "reason": reason}


def _last_if_nan(value: float) -> float:
    return value if value == value else float("inf")


def _rows(
    loaded: LoadedModel,
    texts: Sequence[Tokens],
    layers: Sequence[int],
    settings: Settings,
    states: States | None,
    on_event: OnEvent,
) -> Measured:
    if states is None and not settings.per_token:
        return mean_residuals(loaded.model, texts, layers, on_event=on_event)
    source = states or residual_states(loaded.model, residual.hidden_size(loaded.model))
    return measured(source, texts, layers, per_token=settings.per_token, on_event=on_event)


def _metadata(
    loaded: LoadedModel,
    contrast: Contrast,
    settings: Settings,
    found: dict[int, Figures],
    recommended: dict[str, Any],
    counts: dict[str, int],
) -> dict[str, Any]:
    parameter = next(loaded.model.parameters())
    metadata: dict[str, Any] = {
        "base": loaded.identity,
        "site": settings.site,
        "method": {
            "name": settings.method,
            "parameters": {
                "tokens": settings.tokens,
                "per_token": settings.per_token,
                "pool": settings.pool,
                "seed": settings.seed,
                "truncate": settings.truncate,
                # The last bits follow from these two as well.
                "device": parameter.device.type,
                "dtype": str(parameter.dtype).removeprefix("torch."),
            },
        },
        "data": {
            "digests": contrast.digests,
            "examples": counts,
            **overlap.record([*contrast.positive, *contrast.negative]),
        },
        "measured": {str(i): each.numbers() for i, each in found.items()},
        "recommended": recommended,
    }
    licence = references.licence(loaded.source)
    return metadata | ({"licence": licence} if licence else {})


def _warnings(counts: dict[str, int], without: Sequence[int]) -> list[str]:
    warnings = []
    if min(counts.values()) < FEW:
        warnings.append(
            f"{counts['positive']} positive and {counts['negative']} negative examples: "
            f"with fewer than {FEW} of a class the figures mean little"
        )
    if without:
        warnings.append(f"layer {spans(without)} is left out: the activations of both classes are the same there")
    return warnings
