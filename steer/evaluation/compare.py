"""Several models in one table: how much of a trait each shows, and how far it has moved where it should not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from probes.data.reading import read
from probes.models.loading import load
from probes.scores import divergence
from probes.steered import steered
from steer.training import evaluation, evaluation_set


class Shown(NamedTuple):
    """A model by its reference, and what it is steered by: an expression over `vectors`, or None."""

    model: str
    composition: str | None = None
    vectors: Mapping[str, str | Path] = {}


def compare(
    models: Mapping[str, Shown], pos: Path, neg: Path, *, examples: int = 24, device: str = "auto", seed: int = 0
) -> dict[str, dict[str, float]]:
    """By name: `margin`, the log-likelihood per token of positive less negative examples, and `kl_neutral`, in nats.

    The first model is the base, which writes the neutral text and which the others are compared with. Of the examples
    the last ones are taken. Raises ExampleError, ModelError.
    """
    read(pos, neg)  # refused, if it must be, before a model is loaded
    found: dict[str, dict[str, float]] = {}
    held: evaluation.Held | None = None
    loaded: dict[str, Any] = {}
    for name, shown in models.items():
        if shown.model not in loaded:
            loaded = {shown.model: load(shown.model, device, "float32")}  # one at a time in memory
        ready = loaded[shown.model]
        if held is None:
            held = evaluation_set.held(ready, evaluation_set.sides(ready, pos, neg, last=examples), seed=seed)
        within: divergence.Within = divergence.plain
        if shown.composition is not None:

            def within(prompts: Sequence[int], shown: Shown = shown, model: Any = ready.model) -> Any:
                assert shown.composition is not None
                return steered(model, shown.composition, vectors=shown.vectors, prompt_length=prompts)

        found[name] = evaluation.look(ready.model, held, within)
    return found
