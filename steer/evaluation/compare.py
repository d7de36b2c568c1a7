"""Several models in one table: how much of a trait each shows, and how far it is from the base on neutral text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from probes.data.reading import read
from probes.evaluation_set import EvaluationSet, contrast_of, evaluate, evaluation_set
from probes.interventions import Intervention, no_intervention, steering
from probes.models.loading import load


class ComparedModel(NamedTuple):
    """A model reference, and the composition that steers the model: an expression over `vectors`, or None."""

    model: str
    composition: str | None = None
    vectors: Mapping[str, str | Path] = {}


def compare(
    models: Mapping[str, ComparedModel],
    pos: Path,
    neg: Path,
    *,
    examples: int = 24,
    device: str = "auto",
    seed: int = 0,
    scores: Sequence[str] = (),
) -> dict[str, dict[str, float]]:
    """The figures of each model by its name, as `probes.evaluation_set.evaluate` returns them.

    Among them are `margin`, the log-likelihood of the positive examples less that of the negative ones, and
    `kl_neutral`, KL(base || model) on neutral text; both in nats per token. The first model is the base, which also
    writes the neutral text. The last `examples` of each of the files `pos` and `neg` are used. `scores` names further
    scores to measure on the neutral text. Raises ExampleError, ModelError, UsageError.
    """
    read(pos, neg)  # refused, if it must be, before a model is loaded
    figures: dict[str, dict[str, float]] = {}
    measured_on: EvaluationSet | None = None
    loaded: dict[str, Any] = {}
    for name, each in models.items():
        if each.model not in loaded:
            loaded = {each.model: load(each.model, device, "float32")}  # one at a time in memory
        ready = loaded[each.model]
        if measured_on is None:
            measured_on = evaluation_set(ready, contrast_of(ready, pos, neg, last=examples), seed=seed)
        intervention: Intervention = no_intervention
        if each.composition is not None:
            intervention = steering(ready.model, each.composition, each.vectors)
        figures[name] = evaluate(ready.model, measured_on, intervention, more=scores)
    return figures
