"""What the arms wrote: one answer of every arm to every prompt and sample, and how they are kept in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from probes.seeds import child_seed
from steer.experiments.paired.inputs import Inputs
from steer.experiments.paired.request import Request
from vectors.documents import json_text
from vectors.documents.schema import list_of, mapping_of, number, optional, problems_of, record, text, whole
from vectors.errors import ArtifactError
from vectors.events import OnEvent

FILE = "answers.json"


class Answer(NamedTuple):
    """An answer: its text without special tokens, and its ids with the end token.

    `likelihood` is its mean log-likelihood under the unsteered model without a system prompt, in nats per token; None
    for an answer without a token. `gates` is what each condition of the arm has read and decided, as in the receipts of
    a server: the `condition`, the `value` that was read (the mean of several; None for a section), for how many values
    it `held`, and how many were `read`; None for an arm without conditions.
    """

    text: str
    ids: list[int]
    likelihood: float | None
    gates: list[dict[str, Any]] | None = None


class Row(NamedTuple):
    """What all arms answer: a prompt by its index, and which sample it is. The same name draws the same numbers."""

    prompt: int
    sample: int

    @property
    def name(self) -> str:
        """The name of its random numbers."""
        return f"{self.prompt}#{self.sample}"


# Writes the answers of every arm to the rows, by the arm's name.
Write = Callable[[Inputs, Request, OnEvent], dict[str, list[Answer]]]


def rows_of(inputs: Inputs, request: Request) -> list[Row]:
    """The rows: prompt by prompt, its samples one after the other."""
    return [Row(index, sample) for index in range(len(inputs.prompts)) for sample in range(request.samples)]


def seed_of(row: Row, seed: int) -> int:
    """The seed of a row's random numbers, 63 bits, the same for every arm."""
    return child_seed(seed, "sample", row.name)


_GATE = record({"condition": text(), "value": optional(number), "held": whole(0, 2**31), "read": whole(0, 2**31)})
_ANSWER = record(
    {"text": text(), "ids": list_of(whole(0, 2**31)), "likelihood": optional(number)},
    {"gates": optional(list_of(_GATE))},
)
_STORED = record({"identity": record({}), "answers": mapping_of(list_of(_ANSWER))})


def stored(folder: Path) -> tuple[Mapping[str, Any], dict[str, list[Answer]]] | None:
    """(identity, answers by arm) of a folder; None where it holds none. Raises ArtifactError for a damaged file."""
    path = folder / FILE
    if not path.is_file():
        return None
    value = json_text.read(path, ArtifactError, "remove the folder, and write the answers again")
    problems = problems_of(value, _STORED)
    if problems:
        raise ArtifactError(
            [f"{path} is damaged: {problem}" for problem in problems], "remove the folder, and write the answers again"
        )
    return value["identity"], {name: [Answer(**each) for each in listed] for name, listed in value["answers"].items()}


def value_of(identity: Mapping[str, Any], answers: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """Answers as JSON values, as they are kept."""
    return {
        "identity": dict(identity),
        "answers": {name: [each._asdict() for each in listed] for name, listed in answers.items()},
    }
