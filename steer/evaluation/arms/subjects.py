"""Subjects: what an evaluation is about, from the words of a command, with the operating point fixed.

A subject is an expression over vectors, a vector's file, `prompt:TEXT`, a model's folder (a fold, a trained model, a
merge), an adapter's folder, or a task vector's file.
"""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from merges.inputs import locations
from steer.evaluation.arms.arm import BASE, Arm
from steer.evaluation.arms.controls import CONTROLS
from vectors.errors import ArtifactError, SteerError, UsageError, collecting, raise_together
from vectors.fit import recommended_strength
from vectors.references import DEFAULT
from vectors.registry.layers import spans
from vectors.resolve import Resolver, compose_gated
from vectors.steering import SteeringVector
from vectors.task import TaskVector

PROMPT = "prompt:"


@dataclass(frozen=True)
class Subject:
    """A subject: its arm at the operating point, the arm's kind, and where strength and layers came from.

    `kind` is composition, prompt, model, adapter or task-vector; `files` are the vector files behind names.
    """

    name: str
    kind: str
    arm: Arm
    point: str
    files: Mapping[str, Path] = field(default_factory=dict)


def subjects_of(
    texts: Sequence[str],
    vectors: Mapping[str, str | Path | SteeringVector] | None = None,
    *,
    strength: float | None = None,
    allow_strength: bool = False,
    resolvers: Sequence[Resolver] | None = None,
    names: Mapping[str, str] | None = None,
) -> list[Subject]:
    """The subjects that these words name. `strength` multiplies every expression, instead of what vectors recommend.

    `names` are those that subjects get in tables and reports, by their words, which are the names of all others.
    A prompt may stand in quotation marks, as in prompt:"Answer warmly.", which are no part of it.
    Raises one error with all problems: UsageError, ExpressionError, ArtifactError.
    """
    texts, names = [unquoted(text) for text in texts], names or {}
    errors: list[SteerError] = []
    subjects: list[Subject] = []
    for text in texts:
        with collecting(errors):
            subject = _subject(text, vectors or {}, strength, allow_strength, resolvers)
            name = names.get(text, text)
            subjects.append(replace(subject, name=name, arm=replace(subject.arm, name=name)))
    repeated = sorted({text for text in texts if texts.count(text) > 1})
    if repeated:
        problems = [f"the subject {names.get(text, text)} is given {texts.count(text)} times" for text in repeated]
        errors.append(UsageError(problems, "give each subject once"))
    if not texts:
        errors.append(UsageError("there is no subject", "steer eval warm.safetensors --pos P --neg N"))
    raise_together(errors)
    return subjects


def unquoted(text: str) -> str:
    """A subject without the quotation marks around its prompt, which a shell takes away and Python does not."""
    prompt = text.removeprefix(PROMPT).strip()
    mark, inner, last = prompt[:1], prompt[1:-1], prompt[-1:]
    if text.startswith(PROMPT) and len(prompt) > 1 and mark in "\"'" and mark == last and mark not in inner:
        return PROMPT + inner
    return text


def problems_of_names(subjects: Sequence[Subject], prompt: str | None = None) -> list[str]:
    """What is wrong with the names of subjects: arms are told apart by name, and one is that of another arm.

    `prompt` is the system prompt that subjects are compared with.
    """
    problems = []
    for name in (subject.name for subject in subjects):
        if name == BASE:
            problems.append(f"the subject {name!r} has the name of the unsteered model")
        for other in (subject.name for subject in subjects if subject.name != name):
            control = name.removeprefix(f"{other}: ").split()[:1] if name.startswith(f"{other}: ") else []
            if set(control) & CONTROLS.keys() or name.startswith(f"{other} x "):
                problems.append(f"the subject {name!r} may have the name of an arm of the subject {other!r}")
        if prompt is not None and name in (f"prompt + {subject.name}" for subject in subjects):
            problems.append(f"the subject {name!r} has the name of a subject with the prompt of --prompt")
    return problems


def base_reference(subjects: Sequence[Subject]) -> str:
    """The model that the vectors of all subjects record as their base, by default the bundled one.

    Raises UsageError where they record several.
    """
    names = {
        f"{vector.base['name']}@{vector.base['revision']}" if "revision" in vector.base else str(vector.base["name"])
        for subject in subjects
        for vector in subject.arm.vectors.values()
        if "name" in vector.base
    }
    if len(names) > 1:
        raise UsageError(
            f"the vectors belong to different models: {', '.join(sorted(names))}", "choose one: --model MODEL"
        )
    unnamed = [s.name for s in subjects if s.arm.vectors and not any("name" in v.base for v in s.arm.vectors.values())]
    if not names and unnamed:
        raise UsageError(f"{unnamed[0]} does not record the model it belongs to", "give it: --model FOLDER")
    return names.pop() if names else DEFAULT


def _subject(
    text: str,
    vectors: Mapping[str, str | Path | SteeringVector],
    strength: float | None,
    allow_strength: bool,
    resolvers: Sequence[Resolver] | None,
) -> Subject:
    if text.startswith(PROMPT):
        system = text.removeprefix(PROMPT).strip()
        if not system:
            raise UsageError(f"the prompt in {text!r} is empty", 'write prompt:"Answer warmly."')
        return Subject(text, "prompt", Arm(text, system=system), "the prompt as it is given")
    path = locations.path_of(text)
    if locations.adapter(text) is not None:
        return Subject(text, "adapter", Arm(text, model=text), "the adapter at weight 1")
    if os.path.isdir(path):
        return Subject(text, "model", Arm(text, model=text), "the weights as they are")
    if os.path.isfile(path) and path.suffix == ".safetensors" and _is_task_vector(path):
        return Subject(text, "task-vector", Arm(text, model=text), "the task vector at weight 1")
    composition, bound, probes = compose_gated(text, vectors, allow_strength=True, resolvers=resolvers)
    point = "the strengths of the expression"
    terms = composition.terms
    if strength is not None:
        composition, point = composition.scaled(strength), f"--strength {strength:g}"
    elif len(terms) == 1 and terms[0].operation == "add" and terms[0].value == 1:
        recommended = recommended_strength(bound[terms[0].name])
        if recommended is not None:
            composition, point = composition.scaled(recommended), _recommendation(bound[terms[0].name], recommended)
        else:
            point = "strength 1, since the vector recommends none"
    compose_gated(str(composition), {**probes, **bound}, allow_strength=allow_strength)  # refuses excessive strengths
    files = {name: Path(value) for name, value in vectors.items() if name in bound and isinstance(value, str | Path)}
    if os.path.isfile(path):
        files[path.stem] = path
    return Subject(text, "composition", Arm(text, composition=composition, vectors=bound, probes=probes), point, files)


def _recommendation(vector: SteeringVector, strength: float) -> str:
    """What a vector's file recommends, in words; the entry that a sweep wrote names its run."""
    by = "a sweep" if "run" in vector.metadata["recommended"] else "its extraction"
    layers = spans(vector.apply)
    return f"the vector's recommendation by {by}: strength {strength:g} at layer{'s'[: not layers.isdigit()]} {layers}"


def _is_task_vector(path: Path) -> bool:
    try:
        TaskVector.open(path)
    except (ArtifactError, OSError):
        return False
    return True
