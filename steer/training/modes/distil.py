"""Distillation: the student learns to predict, unsteered or unprompted, what the teacher predicts.

Completions are sampled from the teacher, and a quarter of them from the untrained student, so that it also learns on
its own samples (Bhargava et al. 2024, arXiv:2409.13697; Blank et al. 2026, arXiv:2606.00995). The teacher is the same
model under hooks or a prompt. It runs once, before training, and its likeliest tokens are stored as targets, so only
one copy of the model is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from merges.inputs.sources import open_source
from probes.data import prompts
from probes.data.reading import read_prompts
from probes.data.splits import held_out_split
from probes.evaluation_set import Behaviour, from_target
from probes.generation import generate
from probes.models.completions import Completion
from probes.models.loading import LoadedModel
from probes.models.residual import context_length
from probes.models.tokens import rendered
from steer.folding.fold import check_vectors
from steer.training.bake import bake
from steer.training.data import filtering, samples, teachers
from steer.training.data.replay import replay_samples
from steer.training.data.samples import Samples
from steer.training.data.teachers import Teacher
from steer.training.mode import Mode
from steer.training.objectives import divergence
from steer.training.requests import DistilRequest
from vectors.errors import UsageError
from vectors.events import Event, OnEvent, ignore
from vectors.resolve import compose
from vectors.storage.files import digest_json

REQUEST = DistilRequest
ON_POLICY = 0.25  # share of the completions that the student samples itself
LEAST_HELD_OUT = 8  # prompts
LEAST_APART = 1e-4  # nats: least divergence of the teacher from the base
LEAST_COMPLETIONS = 4


def run(request: DistilRequest, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Distil the steered or prompted model into the weights; returns the report. Raises SteerError."""
    return bake(request, mode(request), on_event=on_event)


def mode(request: DistilRequest) -> Mode:
    """The mode for `bake`. Raises SteerError before any work."""
    if (request.composition is None) == (request.teacher_prompt is None):
        raise UsageError(
            "give either a composition or a --teacher-prompt as the teacher", "steer bake 'warm' --mode distil"
        )
    user_prompts, digest = read_prompts(request.prompts) if request.prompts else ([], None)
    inputs: dict[str, Any] = {"prompts": digest or digest_json(list(prompts.PROMPTS))}

    def prepare(loaded: LoadedModel, teacher: Teacher | None, on_event: OnEvent) -> Samples:
        assert teacher is not None
        return _prepare(request, loaded, teacher, _choose_prompts(user_prompts), on_event)

    if request.teacher_prompt is not None:
        text = request.teacher_prompt
        return Mode("distil", text, divergence, prepare, inputs, teacher=lambda loaded: teachers.by_prompt(text))
    assert request.composition is not None
    composition, vectors = compose(request.composition, request.vectors)
    check_vectors(open_source(request.model), vectors, request.any_base)
    inputs |= {f"vector {name}": vector.digest for name, vector in vectors.items()}

    def teacher(loaded: LoadedModel) -> Teacher:
        return teachers.by_composition(loaded.model, composition, vectors, request.any_base)

    # Layers below the lowest steered one compute the same in teacher and student, so they need no adapter.
    first = teachers.first_layer(composition, vectors)
    return Mode("distil", str(composition), divergence, prepare, inputs, teacher, first)


class Prompts(NamedTuple):
    """Prompts to train on, and held-out prompts."""

    train: list[str]
    held_out: list[str]


def _choose_prompts(user: Sequence[str]) -> Prompts:
    """The user's prompts and as many built-in ones, since training on one kind of prompt does not generalise."""
    train = list(dict.fromkeys([*user, *prompts.taught()[: len(user) or None]]))
    # Half as many are held out, but at least as many as a mean needs.
    rest = [prompt for prompt in prompts.held_out() if prompt not in train]
    return Prompts(train, rest[: max(LEAST_HELD_OUT, len(train) // 2)])


class Completions(NamedTuple):
    """The same completions after the prompts of the student, and after those of the teacher."""

    student: list[Completion]
    teacher: list[Completion]


def _prepare(
    request: DistilRequest, loaded: LoadedModel, teacher: Teacher, chosen: Prompts, on_event: OnEvent
) -> Samples:
    """Sample completions, filter them, and take the teacher's distributions over their tokens."""
    sampled = _sample(request, loaded, teacher, chosen, on_event)
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
        places, held_places = held_out_split([sample.digest for sample in made])
        train, held_out = [made[i] for i in places], [made[i] for i in held_places]
    _require_difference(loaded, [*train, *held_out])
    replay, replay_held = replay_samples(
        request.replay, loaded, len(train), tokens=request.tokens, seed=request.settings.seed, on_event=on_event
    )
    counts = {
        "asked": total, "sampled": len(sampled.student), "left_out": fit.left_out, "behaviour": len(train),
        "general": len(replay),
    }  # fmt: skip
    return Samples([*train, *replay], [*held_out, *replay_held], counts)


def _sample(
    request: DistilRequest, loaded: LoadedModel, teacher: Teacher, chosen: Prompts, on_event: OnEvent
) -> Completions:
    """The teacher's completion of each prompt, then the student's own of some of them."""
    seed, tokens, temperature = request.settings.seed, request.tokens, request.temperature
    texts = [*chosen.train, *chosen.held_out]
    for_teacher, for_student = teacher.asked(texts, loaded.tokenizer), rendered(texts, loaded.tokenizer)
    _require_length(loaded, for_teacher, tokens)
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
    difference = from_target(loaded.model, Behaviour([s.completion for s in first], [s.target for s in first], True))
    if difference < LEAST_APART:
        raise UsageError(
            f"teacher and model predict the same ({difference:.2g} nats apart): there is nothing to learn",
            "use a greater strength, or another prompt",
        )
