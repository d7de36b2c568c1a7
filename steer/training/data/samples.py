"""Samples: ids with what is to be predicted at each token of the completion. They can be kept on disk, for resuming."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save

from probes.scores.divergence import Row, Within, completions, plain
from steer.training.data.targets import TOP, Target, certain, top
from vectors.files import digest_json, write_atomically

BEHAVIOUR, GENERAL = "behaviour", "general"


class Sample(NamedTuple):
    """One sequence: its ids, where its completion begins, what to predict there, and whether it is general data.

    A preference has its less wanted completion in `other`, and the base's `likelihood` of both, in nats.
    """

    ids: list[int]
    prompt: int
    target: Target
    kind: str = BEHAVIOUR
    likelihood: float = 0.0
    other: Sample | None = None

    @property
    def digest(self) -> str:
        """Of the sequence, by which it is dealt to training or held out."""
        return digest_json([self.ids, self.prompt, self.kind])


def taught_by(
    model: Any,
    rows: Sequence[Row],
    asked: Sequence[Row],
    within: Within = plain,
    *,
    kind: str = BEHAVIOUR,
    count: int = TOP,
) -> list[Sample]:
    """What the teacher says at each token: `asked` are the rows as it sees them, ending as the student's `rows` do."""
    targets = {place: top(logits, count) for place, logits in completions(model, asked, within)}
    return [Sample(row.ids, row.prompt, targets[place], kind) for place, row in enumerate(rows)]


def told_by(rows: Sequence[Row], *, kind: str = BEHAVIOUR) -> list[Sample]:
    """The texts themselves are what is to be predicted."""
    return [Sample(row.ids, row.prompt, certain(torch.tensor(row.said)), kind) for row in rows]


def save_all(samples: Sequence[Sample], path: Path) -> None:
    """Write samples as one safetensors file, whole or not at all."""
    tensors, lines = {}, []
    flat = [one for sample in samples for one in (sample, sample.other) if one is not None]
    for number, sample in enumerate(flat):
        # Clones: what shares memory in this process must not on disk.
        tensors[f"{number}.tokens"] = sample.target.tokens.int()
        tensors[f"{number}.logs"] = sample.target.logs.clone()
        lines.append([sample.ids, sample.prompt, sample.kind, sample.likelihood, sample.other is not None])
    write_atomically(path, save(tensors, {"samples": json.dumps(lines)}))


def load_all(path: Path) -> list[Sample]:
    """Read what `save_all` wrote."""
    from vectors.weights import read_header

    tensors = load_file(path)
    found: list[Sample] = []
    pending: Sample | None = None
    for number, (ids, prompt, kind, likelihood, paired) in enumerate(json.loads(read_header(path)[1]["samples"])):
        target = Target(tensors[f"{number}.tokens"].long(), tensors[f"{number}.logs"])
        sample = Sample(ids, prompt, target, kind, likelihood)
        if paired:
            pending = sample
        elif pending is not None:
            found.append(pending._replace(other=sample))
            pending = None
        else:
            found.append(sample)
    return found
