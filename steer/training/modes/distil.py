"""Distillation: the student learns to predict, unsteered or unprompted, what the teacher predicts.

Completions are sampled from the teacher, and a quarter from the model as it is, so that the student also learns what to
do where its own words lead (Bhargava et al. 2024, arXiv:2409.13697; Blank et al. 2026, arXiv:2606.00995). The teacher
is the same model, under hooks or a prompt, asked once before training: its likeliest tokens are kept, and there is one
copy in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from probes.data import prompts
from probes.data.reading import read_prompts
from probes.data.splits import held_out_split
from probes.evaluation_set import Behaviour, from_target
from probes.generation import generate
from probes.models.loading import LoadedModel
from probes.models.residual import context_length
from probes.models.tokens import rendered
from steer.training.bake import Mode, Prepared, Request, Tell
from steer.training.data import filtering, samples, teachers
from steer.training.data.replay import general_samples
from steer.training.data.teachers import Teacher
from steer.training.objectives import divergence
from vectors.errors import UsageError
from vectors.files import digest_json
from vectors.resolve import compose
from vectors.steering import SteeringVector

ON_POLICY = 0.25  # of the completions are the student's own
LOOKED_AT = 8  # prompts that are held out at least
LEAST = 1e-4  # nats: a teacher that is nearer to the base teaches nothing


def mode(
    request: Request,
    *,
    composition: str | None = None,
    vectors: Mapping[str, str | Path | SteeringVector] | None = None,
    teacher_prompt: str | None = None,
    asked: Path | None = None,
    tokens: int = 48,
    temperature: float = 1.0,
    any_base: bool = False,
) -> Mode:
    """Distil a composition, or a prompt; `asked` is a file of the user's prompts. Raises SteerError before any work."""
    if (composition is None) == (teacher_prompt is None):
        raise UsageError(
            "a teacher is a composition or a --teacher-prompt, one of them", "steer bake 'warm' --mode distil"
        )
    problems = [f"--tokens is {tokens}, not at least 1"] if tokens < 1 else []
    problems += [f"--temperature is {temperature:g}, not at least 0"] if temperature < 0 else []
    if problems:
        raise UsageError(problems, "see steer bake --help")
    own, digest = read_prompts(asked) if asked else ([], None)
    inputs: dict[str, Any] = {"prompts": digest or digest_json(list(prompts.PROMPTS))}
    if composition is not None:
        from merges.inputs.sources import open_source
        from steer.folding.fold import check_vectors

        parsed, found = compose(composition, vectors)
        check_vectors(open_source(request.model), found, any_base)
        inputs |= {f"vector {name}": vector.digest for name, vector in found.items()}
        behaviour = str(parsed)

        def teacher(loaded: LoadedModel) -> Teacher:
            return teachers.by_composition(loaded.model, parsed, found, any_base)
    else:
        assert teacher_prompt is not None
        behaviour = teacher_prompt

        def teacher(loaded: LoadedModel) -> Teacher:
            return teachers.by_prompt(teacher_prompt)

    def prepare(loaded: LoadedModel, shown: Teacher | None, tell: Tell) -> Prepared:
        assert shown is not None
        # The user's, and as many generic ones: a behaviour that is learned on one kind of prompt stays there.
        taught = list(dict.fromkeys([*own, *prompts.taught()[: len(own) or None]]))
        # Half as many are held out, but not fewer than a mean wants: few prompts are for a short run.
        held = [prompt for prompt in prompts.held_out() if prompt not in taught][: max(LOOKED_AT, len(taught) // 2)]
        return _prepare(request, loaded, shown, taught, held, tokens, temperature, tell)

    return Mode("distil", behaviour, divergence, teacher, prepare, inputs)


def _prepare(
    request: Request, loaded: LoadedModel, shown: Teacher, asked: Sequence[str], held: Sequence[str], tokens: int,
    temperature: float, tell: Tell,
) -> Prepared:  # fmt: skip
    seed = request.settings.seed
    both = [*asked, *held]
    as_asked, as_student = shown.asked(both, loaded.tokenizer), rendered(both, loaded.tokenizer)
    _check_length(loaded, as_asked, tokens)
    names = [*(f"taught {one}" for one in asked), *(f"held out {one}" for one in held)]

    def show(done: int) -> None:
        tell({"stage": "asking the teacher", "done": done, "total": len(both)})

    show(0)
    from_teacher = generate(
        loaded.model, loaded.tokenizer, as_asked, shown.intervention, max_tokens=tokens, temperature=temperature,
        seed=seed, names=names, progress=show,
    )  # fmt: skip
    count = round(len(asked) * ON_POLICY / (1 - ON_POLICY))
    chosen = sorted(range(len(asked)), key=lambda i: digest_json([seed, asked[i]]))[:count]
    tell({"stage": "asking the student"})
    from_student = generate(
        loaded.model, loaded.tokenizer, [as_student[i] for i in chosen], max_tokens=tokens,
        temperature=temperature, seed=seed, names=[f"own {asked[i]}" for i in chosen],
    )  # fmt: skip
    completions = [*teachers.after(as_student, from_teacher), *from_student]
    seen = [*from_teacher, *teachers.after([as_asked[i] for i in chosen], from_student)]
    tell({"stage": "leaving out what is not fit to learn"})
    fit = filtering.fit_to_learn(loaded.model, loaded.tokenizer, completions)
    if len(fit.completions) < 4:
        raise UsageError(
            f"of {len(completions)} completions {len(fit.completions)} are fit to learn from: {fit.left_out}",
            "use a smaller strength, more prompts (--prompts), or more --tokens",
        )
    tell({"stage": "asking the teacher for its distributions"})
    made = samples.soft_targets(loaded.model, fit.completions, [seen[i] for i in fit.indices], shown.intervention)
    held_out = [s for s, index in zip(made, fit.indices, strict=True) if len(asked) <= index < len(both)]
    taught = [s for s, index in zip(made, fit.indices, strict=True) if not len(asked) <= index < len(both)]
    if not held_out or not taught:
        places, held_places = held_out_split([s.digest for s in made])
        taught, held_out = [made[i] for i in places], [made[i] for i in held_places]
    _check_it_teaches(loaded, [*taught, *held_out])
    general, general_held = general_samples(request.mix, loaded, len(taught), tokens, seed, tell)
    counts = {
        "asked": len(both), "sampled": len(completions), "left_out": fit.left_out, "behaviour": len(taught),
        "general": len(general),
    }  # fmt: skip
    return Prepared([*taught, *general], [*held_out, *general_held], counts)


def _check_length(loaded: LoadedModel, asked: Sequence[Sequence[int]], tokens: int) -> None:
    longest = context_length(loaded.model.config)
    most = max(map(len, asked)) + tokens
    if longest is not None and most > longest:
        raise UsageError(
            f"the longest prompt and {tokens} more are {most} tokens; the model's context has {longest}",
            "shorten the prompts, or lower --tokens",
        )


def _check_it_teaches(loaded: LoadedModel, made: Sequence[samples.Sample]) -> None:
    some = made[:16]
    apart = from_target(loaded.model, Behaviour([s.completion for s in some], [s.target for s in some], True))
    if apart < LEAST:
        raise UsageError(
            f"the teacher predicts what the model predicts ({apart:.2g} nats apart): there is nothing to learn",
            "use a greater strength, or another prompt",
        )
