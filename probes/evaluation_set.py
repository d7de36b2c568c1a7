"""Evaluation on held-out data: how much of a behaviour a model shows, and how far it moved from the base elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from probes.data import prompts
from probes.data.examples import Example
from probes.data.reading import read
from probes.generation import generate
from probes.interventions import Intervention, no_intervention
from probes.logits import completion_logits
from probes.models.completions import Completion, completions_of
from probes.models.loading import LoadedModel
from probes.models.residual import context_length
from probes.models.tokens import plain_ids
from probes.scores import Measured, Score, divergence, likelihood, perplexity, score, target_divergence
from probes.targets import Target
from vectors.errors import UsageError

NEUTRAL_TOKENS = 32

# From examples and a tokenizer to the examples behind a teacher's system prompt, if any; None if it can't be inserted.
AsPrompted = Callable[[Sequence[Example], Any], list[Example] | None]


class Contrast(NamedTuple):
    """Examples that show a trait, and examples that show its opposite; both empty where there are none."""

    positive: Sequence[Completion] = ()
    negative: Sequence[Completion] = ()


class Behaviour(NamedTuple):
    """Held-out completions, and the target of each: a teacher's distributions (`by_teacher`), or its own tokens."""

    completions: Sequence[Completion] = ()
    targets: Sequence[Target] = ()
    by_teacher: bool = False


class EvaluationSet(NamedTuple):
    """The data of an evaluation: a behaviour, neutral completions with the base's logits, and examples of a trait."""

    behaviour: Behaviour
    neutral: Sequence[Completion]
    neutral_base: Sequence[Tensor]  # logits float32 [tokens of the completion, vocabulary], one for each
    contrast: Contrast


def evaluation_set(
    loaded: LoadedModel, contrast: Contrast, behaviour: Behaviour | None = None, *, seed: int = 0
) -> EvaluationSet:
    """An evaluation set whose neutral completions are written, and scored, by the base, which is `loaded`."""
    neutral = neutral_completions(loaded, seed)
    logits = dict(completion_logits(loaded.model, neutral))
    return EvaluationSet(behaviour or Behaviour(), neutral, [logits[i] for i in range(len(neutral))], contrast)


def contrast_of(
    loaded: LoadedModel, pos: Path | None, neg: Path | None, *, last: int = 0, as_prompted: AsPrompted | None = None
) -> Contrast:
    """The examples of the files `pos` and `neg` as completions; empty if either is None.

    A `last` above 0 takes only that many of each file, from its end. `as_prompted` puts a teacher's system prompt, if
    any, in front of them; where it can't, the result is empty. Raises ExampleError.
    """
    if not (pos and neg):
        return Contrast()
    read_examples = read(pos, neg)
    sides = []
    for side in (read_examples.positive, read_examples.negative):
        examples: list[Example] | None = list(side[-last:])
        if as_prompted is not None:
            examples = as_prompted(examples or [], loaded.tokenizer)
        if examples is None:
            return Contrast()
        sides.append(completions_of(examples, loaded.tokenizer, context_length(loaded.model.config)))
    return Contrast(*sides)


def neutral_completions(loaded: LoadedModel, seed: int) -> list[Completion]:
    """Texts that are no conversations: what the model samples, at temperature 1, after held-out `prompts.general`."""
    openings = prompts.general(held_out=True)
    ids = plain_ids(openings, loaded.tokenizer)
    completions = generate(
        loaded.model, loaded.tokenizer, ids, max_tokens=NEUTRAL_TOKENS, temperature=1.0, seed=seed, names=openings
    )
    return [completion for completion in completions if completion.completion_ids]


def evaluate(
    model: Any, evaluated: EvaluationSet, intervention: Intervention = no_intervention, *, more: Sequence[str] = ()
) -> dict[str, float]:
    """The figures of one model by name: a perplexity, and the others in nats per token.

    `kl_teacher` is KL(teacher || model) on the held-out behaviour, or `loss` the cross-entropy of held-out texts;
    `kl_neutral` is KL(base || model) and `perplexity_neutral` the perplexity of the neutral completions; `margin` is
    the log-likelihood of the examples of a trait less that of its opposite, where there are any. `more` names scores to
    measure on the neutral completions besides, each as `NAME_neutral` in its own unit. Raises UsageError for an unknown
    score.
    """
    figures: dict[str, float] = {}
    if evaluated.behaviour.completions:
        name = "kl_teacher" if evaluated.behaviour.by_teacher else "loss"
        figures[name] = divergence_from_targets(model, evaluated.behaviour, intervention)
    names = ["kl_neutral", "perplexity_neutral", *(f"{name}_neutral" for name in more)]
    scores = [divergence, perplexity, *map(score, more)]
    values = measure(model, evaluated.neutral, scores, intervention, base_logits=evaluated.neutral_base)
    figures.update(zip(names, values, strict=True))
    if evaluated.contrast.positive and evaluated.contrast.negative:
        figures["margin"] = margin(model, evaluated.contrast, intervention)
    return figures


def measure(
    model: Any,
    completions: Sequence[Completion],
    scores: Sequence[Score],
    intervention: Intervention = no_intervention,
    *,
    base_logits: Sequence[Tensor] = (),
    targets: Sequence[Target] = (),
) -> list[float]:
    """The figure of each score over the completions, in the order of `scores`, from one pass of the model over each.

    `base_logits` (float32 [tokens of the completion, vocabulary]) and `targets` have one entry for each completion.
    Raises UsageError for a score that needs what is not given.
    """
    available = (
        {"completion", "logits"} | ({"base logits"} if base_logits else set()) | ({"target"} if targets else set())
    )
    missing = [f"a score needs the {each.NEEDS}: {each.SUMMARY}" for each in scores if each.NEEDS not in available]
    if missing:
        raise UsageError(missing, "measure it where there is one")
    values: list[list[float]] = [[] for _ in scores]
    for index, logits in completion_logits(model, completions, intervention):
        measured = Measured(
            completions[index],
            logits,
            base_logits[index] if base_logits else None,
            targets[index] if targets else None,
        )
        for each, of_score in zip(scores, values, strict=True):
            of_score.append(each.score(measured))
    return [each.combine(of_score) for each, of_score in zip(scores, values, strict=True)]


def counts(evaluated: EvaluationSet) -> dict[str, int]:
    """The number of items behind each kind of figure: held-out samples, neutral texts, examples of a trait."""
    return {
        "held_out": len(evaluated.behaviour.completions),
        "neutral": len(evaluated.neutral),
        "positive": len(evaluated.contrast.positive),
        "negative": len(evaluated.contrast.negative),
    }


def divergence_from_targets(model: Any, behaviour: Behaviour, intervention: Intervention = no_intervention) -> float:
    """The mean over completions of KL(target || model), in nats per token."""
    (value,) = measure(model, behaviour.completions, [target_divergence], intervention, targets=behaviour.targets)
    return value


def margin(model: Any, contrast: Contrast, intervention: Intervention = no_intervention) -> float:
    """The log-likelihood per token of the positive less that of the negative examples, in nats."""
    (positive,) = measure(model, contrast.positive, [likelihood], intervention)
    (negative,) = measure(model, contrast.negative, [likelihood], intervention)
    return positive - negative


def dose(base: Mapping[str, float], teacher: Mapping[str, float], student: Mapping[str, float]) -> dict[str, float]:
    """How much of the teacher's behaviour the student has, from their figures: 0 is the base, 1 the teacher.

    `kl` is 1 - KL(teacher || student) / KL(teacher || base); `margin` is the student's shift of the margin from the
    base, as a share of the teacher's. A share whose divisor is zero or was not measured is left out.
    """
    shares: dict[str, float] = {}
    if base.get("kl_teacher"):
        shares["kl"] = 1 - student["kl_teacher"] / base["kl_teacher"]
    if "margin" in base and teacher["margin"] != base["margin"]:
        shares["margin"] = (student["margin"] - base["margin"]) / (teacher["margin"] - base["margin"])
    return shares


def retention(base: Mapping[str, float], student: Mapping[str, float]) -> float:
    """Perplexity of the base over that of the student, on neutral text that the base wrote: 1 if nothing is lost."""
    return base["perplexity_neutral"] / student["perplexity_neutral"]
