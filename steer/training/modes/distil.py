"""Distillation: the student learns to predict, unsteered or unprompted, what the teacher predicts.

The teacher is the same model under hooks or a prompt. It runs once, before training, and its likeliest tokens are
stored as targets, so only one copy of the model is in memory.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.training.requests import CompositionRequest, TrainingRequest
from vectors.errors import UsageError
from vectors.events import OnEvent, ignore
from vectors.registry.options import option

if TYPE_CHECKING:
    from probes.data.examples import Example
    from probes.models.loading import LoadedModel
    from steer.training.data.samples import Samples
    from steer.training.data.teachers import Teacher
    from steer.training.mode import Mode
    from vectors.steering import SteeringVector

MODE = "distil"
SUMMARY = "from a steered or prompted teacher"
NEEDS = ()  # a composition or a teacher's prompt


@dataclass(frozen=True, kw_only=True)
class DistilRequest(TrainingRequest, CompositionRequest):
    """Distillation: the steered or prompted model is the teacher."""

    teacher_prompt: str | None = option(
        None, help="Distil what the model does under this system prompt.", group="Distillation"
    )
    tokens: int = option(48, help="The most tokens to sample per completion.", low=1, group="Distillation")
    temperature: float = option(
        1.0, help="The sampling temperature; 0 is greedy decoding.", low=0, group="Distillation"
    )

    @property
    def sampling(self) -> dict[str, Any]:
        """How completions are sampled, as run records name it."""
        return {"tokens": self.tokens, "temperature": self.temperature}


REQUEST = DistilRequest


def run(request: DistilRequest, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Distil the steered or prompted model into the weights; returns the report. Raises SteerError."""
    from steer.training.bake import bake

    return bake(request, mode(request), on_event=on_event)


def mode(request: DistilRequest) -> Mode:
    """The mode for `bake`. Raises SteerError before any work."""
    from merges.inputs.sources import open_source
    from probes.data import prompts
    from probes.data.reading import read_prompts
    from probes.models.loading import open_model
    from steer.folding.fold import require_fitting_vectors
    from steer.training.data import teacher_samples, teachers
    from steer.training.mode import Mode
    from steer.training.objectives import divergence
    from vectors.resolve import compose
    from vectors.storage.files import digest_json

    if (request.composition is None) == (request.teacher_prompt is None):
        raise UsageError(
            "give either a composition or a --teacher-prompt as the teacher", "steer bake 'warm' --mode distil"
        )
    user_prompts, digest = read_prompts(request.prompts) if request.prompts else ([], None)
    inputs: dict[str, Any] = {"prompts": digest or digest_json(list(prompts.PROMPTS))}
    _warn_of_shared_prompts(request, user_prompts)
    sampling = teacher_samples.Sampling(request.tokens, request.temperature, request.settings.seed)

    def prepare(loaded: LoadedModel, teacher: Teacher | None, on_event: OnEvent) -> Samples:
        assert teacher is not None
        chosen = teacher_samples.choose_prompts(user_prompts)
        return teacher_samples.prepare(loaded, teacher, chosen, sampling, request.replay, on_event)

    if request.teacher_prompt is not None:
        text = request.teacher_prompt
        teachers.by_prompt(text).prompt_ids(["Hi"], open_model(request.model).tokenizer)  # a template may leave it out
        return Mode("distil", text, divergence, prepare, inputs, teacher=lambda loaded: teachers.by_prompt(text))
    assert request.composition is not None
    composition, vectors = compose(request.composition, request.vectors, allow_strength=request.allow_strength)
    require_fitting_vectors(open_source(request.model), vectors, request.any_base)
    _warn_of_extraction_examples(request, vectors)
    inputs |= {f"vector {name}": vector.digest for name, vector in vectors.items()}

    def teacher(loaded: LoadedModel) -> Teacher:
        return teachers.by_composition(loaded.model, composition, vectors, request.any_base)

    # Layers below the lowest steered one compute the same in teacher and student, so they need no adapter.
    first = teachers.first_layer(composition, vectors)
    return Mode("distil", str(composition), divergence, prepare, inputs, teacher, first_layer=first)


def _evaluated(request: DistilRequest) -> dict[Path, list[Example]]:
    """The examples of --pos and --neg, as far as they can be read; `bake` reports what is wrong with them."""
    from probes.data.reading import read_class
    from vectors.errors import SteerError

    examples = {}
    for flag, path in (("--pos", request.pos), ("--neg", request.neg)):
        if path is not None:
            with contextlib.suppress(SteerError):
                examples[path] = read_class(path, flag)[0]
    return examples


def _warn_of_extraction_examples(request: DistilRequest, vectors: Mapping[str, SteeringVector]) -> None:
    """Warn of examples to evaluate that a vector was extracted from, by their content or by the digest of the file, and
    of those on which a sweep chose its layers and strength."""
    from probes.data.overlap import recorded_examples
    from steer.training.data.files import file_digest

    evaluated = _evaluated(request)
    for key, did in (("data", "made the vector"), ("chosen_on", "chose where and how strongly the vector acts,")):
        seen = []
        for path, examples in evaluated.items():
            shared: set[str] = set()
            for vector in vectors.values():
                whole = key == "data" and file_digest(path) in _data_digests(vector)
                known = examples if whole else recorded_examples(vector.metadata.get(key), examples)
                shared |= {example.origin for example in known}
            if shared:
                part = "" if len(shared) == len(examples) else f"{len(shared)} of the {len(examples)} examples of "
                seen.append(f"{part}{path}")
        if seen:
            warnings.warn(
                f"{' and '.join(seen)} {did} too: the trait's margin on them is not held out of "
                f"{'the extraction' if key == 'data' else 'the sweep'}",
                stacklevel=3,
            )


def _warn_of_shared_prompts(request: DistilRequest, user_prompts: Sequence[str]) -> None:
    """Warn of prompts to evaluate that are trained on."""
    from probes.data.examples import Example
    from probes.data.overlap import prompt_digest

    trained = {prompt_digest(Example("", prompt)) for prompt in user_prompts}
    for path, examples in _evaluated(request).items() if trained else ():
        shared = sum(prompt_digest(example) in trained for example in examples)
        if shared:
            warnings.warn(
                f"the prompts of {shared} of the {len(examples)} examples of {path} are in --prompts {request.prompts} "
                "too: the trait's margin on them is not held out of the training",
                stacklevel=3,
            )


def _data_digests(vector: SteeringVector) -> list[str]:
    """The digests of the files that a vector was extracted from, as its metadata records them."""
    data = vector.metadata.get("data")
    digests = data.get("digests") if isinstance(data, dict) else None
    return list(digests.values()) if isinstance(digests, dict) else []
