"""Samples of a teacher: completions for the prompts, filtered, with the teacher's distributions as targets.

Completions are sampled from the teacher, and a quarter of them from the untrained student, so that it also learns on
its own samples (Bhargava et al. 2024, arXiv:2409.13697; Blank et al. 2026, arXiv:2606.00995).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from probes.data import prompts
from probes.data.splits import held_out_split
from probes.evaluation_set import Behaviour, divergence_from_targets
from probes.generation import generate
from probes.models.completions import Completion
from probes.models.loading import LoadedModel
from probes.models.residual import context_length
from probes.models.tokens import rendered
from steer.training.data import filtering, samples, teachers
from steer.training.data.replay import replay_samples
from steer.training.data.samples import Samples
from steer.training.data.teachers import Teacher
from steer.training.requests import Replay
from vectors.errors import UsageError
from vectors.events import Event, OnEvent
from vectors.storage.files import digest_json

ON_POLICY = 0.25  # share of the completions that the student samples itself
LEAST_HELD_OUT = 8  # prompts
LEAST_APART = 1e-4  # nats: least divergence of the teacher from the base
LEAST_COMPLETIONS = 4


class Prompts(NamedTuple):
    """Prompts to train on, and held-out prompts."""

    train: list[str]
    held_out: list[str]


def choose_prompts(user: Sequence[str]) -> Prompts:
    """The user's prompts and as many built-in ones, since training on one kind of prompt does not generalise."""
    train = list(dict.fromkeys([*user, *prompts.for_training()[: len(user) or None]]))
    # Half as many are held out, but at least as many as a mean needs.
    known = {prompt.strip() for prompt in train}
    rest = [prompt for prompt in prompts.held_out() if prompt not in known]
    return Prompts(train, rest[: max(LEAST_HELD_OUT, len(train) // 2)])


class Completions(NamedTuple):
    """The same completions after the prompts of the student, and after those of the teacher."""

    student: list[Completion]
    teacher: list[Completion]


class Sampling(NamedTuple):
    """How completions are sampled: their greatest length in tokens, the temperature and the seed."""

    tokens: int
    temperature: float
    seed: int


def prepare(
    loaded: LoadedModel, teacher: Teacher, chosen: Prompts, sampling: Sampling, replay: Replay, on_event: OnEvent
) -> Samples:
    """Sample completions, filter them, and take the teacher's distributions over their tokens."""
    sampled = _sample(loaded, teacher, chosen, sampling, on_event)
    on_event(Event("filtering completions"))
    fit = filtering.fit_to_learn(loaded.model, loaded.tokenizer, sampled.student)
    if len(fit.completions) < LEAST_COMPLETIONS:
        raise UsageError(
            f"of {len(sampled.student)} completions {len(fit.completions)} pass the filters: {fit.left_out}",
            "use a smaller strength, more prompts (--prompts), or more --tokens",
        )
    on_event(Event("computing the teacher's distributions"))
    made = samples.soft_targets(
        loaded.model, fit.completions, [sampled.teacher[i] for i in fit.indices], teacher.intervention
    )
    count, total = len(chosen.train), len(chosen.train) + len(chosen.held_out)
    held_out = [sample for sample, index in zip(made, fit.indices, strict=True) if count <= index < total]
    train = [sample for sample, index in zip(made, fit.indices, strict=True) if not count <= index < total]
    if not held_out or not train:
        for_training, for_validation = held_out_split([sample.digest for sample in made])
        train, held_out = [made[i] for i in for_training], [made[i] for i in for_validation]
    _require_difference(loaded, [*train, *held_out])
    replayed, replayed_held_out = replay_samples(
        replay, loaded, len(train), tokens=sampling.tokens, seed=sampling.seed, on_event=on_event
    )
    counts = {
        "asked": total, "sampled": len(sampled.student), "left_out": fit.left_out, "behaviour": len(train),
        "general": len(replayed),
    }  # fmt: skip
    return Samples([*train, *replayed], [*held_out, *replayed_held_out], counts)


def _sample(
    loaded: LoadedModel, teacher: Teacher, chosen: Prompts, sampling: Sampling, on_event: OnEvent
) -> Completions:
    """The teacher's completion of each prompt, then the student's own of some of them."""
    tokens, temperature, seed = sampling
    texts = [*chosen.train, *chosen.held_out]
    for_teacher, for_student = teacher.prompt_ids(texts, loaded.tokenizer), rendered(texts, loaded.tokenizer)
    _require_length(loaded, for_teacher, tokens)
    # The names seed the sampling: other words would be other completions.
    names = [*(f"taught {text}" for text in chosen.train), *(f"held out {text}" for text in chosen.held_out)]
    by_teacher = generate(
        loaded.model, loaded.tokenizer, for_teacher, teacher.intervention, max_tokens=tokens, temperature=temperature,
        seed=seed, names=names, stage="sampling from the teacher", on_event=on_event,
    )  # fmt: skip
    count = round(len(chosen.train) * ON_POLICY / (1 - ON_POLICY))
    indices = sorted(range(len(chosen.train)), key=lambda i: digest_json([seed, chosen.train[i]]))[:count]
    by_student = generate(
        loaded.model, loaded.tokenizer, [for_student[i] for i in indices], max_tokens=tokens, temperature=temperature,
        seed=seed, names=[f"own {chosen.train[i]}" for i in indices], stage="sampling from the student",
        on_event=on_event,
    )  # fmt: skip
    return Completions(
        [*teachers.after(for_student, by_teacher), *by_student],
        [*by_teacher, *teachers.after([for_teacher[i] for i in indices], by_student)],
    )


def _require_length(loaded: LoadedModel, prompt_ids: Sequence[Sequence[int]], tokens: int) -> None:
    """Raises UsageError for prompts that leave no room for a completion."""
    longest, most = context_length(loaded.model.config), max(map(len, prompt_ids)) + tokens
    if longest is not None and most > longest:
        raise UsageError(
            f"the longest prompt and {tokens} more are {most} tokens; the model's context has {longest}",
            "shorten the prompts, or lower --tokens",
        )


def _require_difference(loaded: LoadedModel, made: Sequence[samples.Sample]) -> None:
    """Raises UsageError for a teacher whose predictions do not differ from the base's."""
    first = made[:16]
    difference = divergence_from_targets(
        loaded.model, Behaviour([s.completion for s in first], [s.target for s in first], True)
    )
    if difference < LEAST_APART:
        raise UsageError(
            f"teacher and model predict the same ({difference:.2g} nats apart): there is nothing to learn",
            "use a greater strength, or another prompt",
        )
