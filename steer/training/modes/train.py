"""Training on the user's own data: texts to imitate, or pairs to prefer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probes.data.examples import Example
from probes.data.splits import held_out_split
from probes.logits import completion_logits, log_likelihoods
from probes.models.completions import Completion, completions_of
from probes.models.loading import LoadedModel
from probes.models.residual import context_length
from steer.training.bake import Mode, Prepared, Request, Tell
from steer.training.data import files, samples
from steer.training.data.replay import general_samples
from steer.training.data.samples import Sample
from steer.training.data.teachers import Teacher
from steer.training.objectives import divergence, preference


def imitate(request: Request, path: Path) -> Mode:
    """Fine-tuning on the completions of a file (SFT). Raises ExampleError."""
    examples, digest = files.examples_of(path, "--data")

    def prepare(loaded: LoadedModel, _teacher: Teacher | None, tell: Tell) -> Prepared:
        made = samples.hard_targets(_completions(loaded, examples))
        return _with_general(request, loaded, made, tell)

    return Mode("train", f"imitate {path.name}", divergence, None, prepare, {"data": digest})


def prefer(request: Request, path: Path) -> Mode:
    """Direct preference optimisation on the pairs of a file. Raises ExampleError."""
    pairs, digest = files.pairs_of(path)

    def prepare(loaded: LoadedModel, _teacher: Teacher | None, tell: Tell) -> Prepared:
        wanted, other = (_scored(loaded, [pair[side] for pair in pairs]) for side in (0, 1))
        made = [a._replace(other=b) for a, b in zip(wanted, other, strict=True)]
        return _with_general(request, loaded, made, tell)

    return Mode("train", f"prefer by {path.name}", preference, None, prepare, {"data": digest})


def _scored(loaded: LoadedModel, examples: list[Example]) -> list[Sample]:
    """The examples as samples, with the base's log-likelihood of each completion."""
    completions = _completions(loaded, examples)
    scored = completion_logits(loaded.model, completions)
    likelihoods = {i: sum(log_likelihoods(logits, completions[i].completion_ids)) for i, logits in scored}
    return [sample._replace(likelihood=likelihoods[i]) for i, sample in enumerate(samples.hard_targets(completions))]


def _with_general(request: Request, loaded: LoadedModel, made: list[Sample], tell: Tell) -> Prepared:
    places, held_places = held_out_split([sample.digest for sample in made])
    taught = [made[i] for i in places]
    general, general_held = general_samples(request.mix, loaded, len(taught), 48, request.settings.seed, tell)
    counts: dict[str, Any] = {"behaviour": len(taught), "general": len(general)}
    return Prepared([*taught, *general], [*(made[i] for i in held_places), *general_held], counts)


def _completions(loaded: LoadedModel, examples: list[Example]) -> list[Completion]:
    return completions_of(examples, loaded.tokenizer, context_length(loaded.model.config))
