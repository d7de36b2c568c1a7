"""Samples: completions with the target at each of their tokens; saved to disk, for resuming."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save

from probes.interventions import Intervention, no_intervention
from probes.logits import completion_logits
from probes.models.completions import Completion
from probes.targets import TOP, Target, hard_target, soft_target
from vectors.storage.files import digest_json, write_atomically

BEHAVIOUR, GENERAL = "behaviour", "general"


class Sample(NamedTuple):
    """A completion, the target at each of its tokens, and its kind: of the behaviour, or replay (`GENERAL`).

    A preference pair has the rejected completion in `other`; `likelihood` is the base's log-likelihood, in nats.
    """

    completion: Completion
    target: Target
    kind: str = BEHAVIOUR
    likelihood: float = 0.0
    other: Sample | None = None

    @property
    def digest(self) -> str:
        """Digest of the sequence, which decides whether the sample is for training or held out."""
        return digest_json([self.completion.ids, self.completion.prompt_length, self.kind])


class Samples(NamedTuple):
    """Training samples, held-out samples, and the numbers of samples by kind, and of those left out by the filters."""

    train: list[Sample]
    held_out: list[Sample]
    counts: dict[str, Any]


def soft_targets(
    model: Any,
    completions: Sequence[Completion],
    as_prompted: Sequence[Completion],
    intervention: Intervention = no_intervention,
    *,
    kind: str = BEHAVIOUR,
    count: int = TOP,
) -> list[Sample]:
    """Samples whose targets are the distributions of a teacher: of the model under `intervention`.

    `as_prompted` are the same completions after the prompts that the teacher sees; `count` is the number of likeliest
    tokens that a target stores.
    """
    scored = completion_logits(model, as_prompted, intervention)
    targets = {index: soft_target(logits, count) for index, logits in scored}
    return [Sample(completion, targets[index], kind) for index, completion in enumerate(completions)]


def hard_targets(completions: Sequence[Completion], *, kind: str = BEHAVIOUR) -> list[Sample]:
    """Samples whose targets are the completions' own tokens."""
    return [Sample(each, hard_target(torch.tensor(each.completion_ids)), kind) for each in completions]


def save_all(samples: Sequence[Sample], path: Path) -> None:
    """Write samples as one safetensors file, whole or not at all."""
    tensors, lines = {}, []
    flat = [side for sample in samples for side in (sample, sample.other) if side is not None]
    for number, sample in enumerate(flat):
        # Cloned, since safetensors refuses tensors that share memory.
        tensors[f"{number}.tokens"] = sample.target.tokens.int()
        tensors[f"{number}.logs"] = sample.target.logs.clone()
        completion = sample.completion
        paired = sample.other is not None
        lines.append([completion.ids, completion.prompt_length, sample.kind, sample.likelihood, paired])
    write_atomically(path, save(tensors, {"samples": json.dumps(lines)}))


def load_all(path: Path) -> list[Sample]:
    """Read what `save_all` wrote."""
    from vectors.weights import read_header

    tensors = load_file(path)
    samples: list[Sample] = []
    pending: Sample | None = None
    for number, (ids, length, kind, likelihood, paired) in enumerate(json.loads(read_header(path)[1]["samples"])):
        target = Target(tensors[f"{number}.tokens"].long(), tensors[f"{number}.logs"])
        sample = Sample(Completion(ids[:length], ids[length:]), target, kind, likelihood)
        if paired:
            pending = sample
        elif pending is not None:
            samples.append(pending._replace(other=sample))
            pending = None
        else:
            samples.append(sample)
    return samples
