"""Interventions on a model while it runs: none, or steering by a composition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from probes.steered import Steering, steered
from vectors.probe import Probe
from vectors.steering import SteeringVector

# From the prompt lengths of a batch's rows (tokens, without padding) to the context in which its passes run.
Intervention = Callable[[Sequence[int]], AbstractContextManager[object]]


def no_intervention(_prompt_lengths: Sequence[int]) -> AbstractContextManager[object]:
    """Leave the model unchanged."""
    return nullcontext()


def steering(
    model: Any,
    composition: Steering | Sequence[Steering],
    vectors: Mapping[str, str | Path | SteeringVector] | None = None,
    *,
    probes: Mapping[str, Probe | SteeringVector] | None = None,
    any_base: bool = False,
) -> Intervention:
    """An intervention that steers every row by one composition, or each row by one of a list.

    The arguments are those of `probes.steered.steered`.
    """

    def intervention(prompt_lengths: Sequence[int]) -> AbstractContextManager[object]:
        return steered(
            model, composition, vectors=vectors, probes=probes, prompt_length=prompt_lengths, any_base=any_base
        )

    return intervention
