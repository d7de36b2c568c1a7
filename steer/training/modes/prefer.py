"""Direct preference optimisation: the student prefers one completion of each pair to the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.training.requests import TrainingRequest
from vectors.errors import UsageError
from vectors.events import OnEvent, ignore
from vectors.registry.options import option

if TYPE_CHECKING:
    from probes.data.examples import Example
    from probes.models.loading import LoadedModel
    from steer.training.data.samples import Sample, Samples
    from steer.training.data.teachers import Teacher
    from steer.training.mode import Mode

MODE = "train"
SUMMARY = "on pairs of a preferred and a rejected completion"
NEEDS = ("pairs",)


@dataclass(frozen=True, kw_only=True)
class PreferRequest(TrainingRequest):
    """Preference optimisation (DPO) on pairs of completions."""

    pairs: Path | None = option(
        None, help="Pairs of a preferred and a rejected completion, for DPO (JSON lines).", group="Data"
    )


REQUEST = PreferRequest


def run(request: PreferRequest, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Train on the pairs of `request.pairs`; returns the report. Raises SteerError."""
    from steer.training.bake import bake

    return bake(request, mode(request), on_event=on_event)


def mode(request: PreferRequest) -> Mode:
    """The mode for `bake`. Raises UsageError, ExampleError."""
    from steer.training.data import files
    from steer.training.data.replay import with_replay
    from steer.training.mode import Mode
    from steer.training.objectives import preference

    if request.pairs is None:
        raise UsageError("there is nothing to prefer: no --pairs", "give a file of pairs: --pairs pairs.jsonl")
    pairs, digest = files.pairs_of(request.pairs)

    def prepare(loaded: LoadedModel, _teacher: Teacher | None, on_event: OnEvent) -> Samples:
        preferred, other = (_with_likelihoods(loaded, [pair[side] for pair in pairs]) for side in (0, 1))
        made = [a._replace(other=b) for a, b in zip(preferred, other, strict=True)]
        return with_replay(request, loaded, made, on_event)

    return Mode(
        "train",
        f"prefer by {request.pairs.name}",
        preference,
        prepare,
        {"data": digest},
        examples={str(request.pairs): [side for pair in pairs for side in pair]},
    )


def _with_likelihoods(loaded: LoadedModel, examples: list[Example]) -> list[Sample]:
    """The examples as samples, with the base's log-likelihood of each completion."""
    from probes.logits import completion_logits, log_likelihoods
    from probes.models.completions import completions_of
    from probes.models.residual import context_length
    from steer.training.data import samples

    completions = completions_of(examples, loaded.tokenizer, context_length(loaded.model.config))
    scored = completion_logits(loaded.model, completions)
    likelihoods = {i: sum(log_likelihoods(logits, completions[i].completion_ids)) for i, logits in scored}
    return [sample._replace(likelihood=likelihoods[i]) for i, sample in enumerate(samples.hard_targets(completions))]
