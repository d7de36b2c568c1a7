"""How far a scorer agrees with people: hand labels, the confusion matrix, and Cohen's kappa with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from probes.data import layouts
from probes.seeds import child_seed
from vectors.errors import ExampleError
from vectors.storage.files import digest_bytes

RESAMPLES = 2000
FEW = 30  # fewer labels give figures and no more
SHOWN = 20
HINT = 'write a line for each text: {"prompt": "...", "response": "...", "label": 0, 1, 2, true or false}'
_WORDS = {"yes": 1, "no": 0, "true": 1, "false": 0}


class Labelled(NamedTuple):
    """A text with a person's label: 0, 1 or 2 for how clearly it shows the behaviour, or 0 and 1 for no and yes."""

    prompt: str
    response: str
    label: int


class Labels(NamedTuple):
    """The labelled texts of a file, whether they are of three levels (else no and yes), and the file's digest."""

    texts: list[Labelled]
    graded: bool
    digest: str


def read_labels(path: Path) -> Labels:
    """Hand labels, one object a line with `prompt`, `response` and `label`; or a table with these columns.

    A label is 0, 1 or 2, or true, false, yes or no; a file without a 2 is one of yes and no. Raises ExampleError with
    every bad line.
    """
    from vectors.documents.json_text import LARGEST, read_bounded

    try:
        content = read_bounded(path, LARGEST)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ExampleError(f"the labels {path} can't be read: {reason}", HINT) from error
    texts, problems = [], []
    for record in layouts.records(str(path), layouts.decoded(path, content)):
        problem = record.problem or _problem(record.value)
        if problem:
            problems.append(f"{record.origin}: {problem}")
        else:
            value = record.value
            texts.append(Labelled(value.get("prompt", ""), value["response"], _label(value["label"]) or 0))
    if not texts and not problems:
        problems.append(f"{path} holds no labels")
    if problems:
        raise ExampleError(problems[:SHOWN], HINT)
    return Labels(texts, any(text.label == 2 for text in texts), digest_bytes(content))


def _problem(value: Any) -> str:
    if not isinstance(value, dict):
        return "it is not an object"
    if not isinstance(value.get("response"), str) or not isinstance(value.get("prompt", ""), str):
        return "it has no text `response`"
    return "" if _label(value.get("label")) is not None else f"label is {value.get('label')!r}, not 0, 1, 2, yes or no"


def _label(value: Any) -> int | None:
    if isinstance(value, str):
        value = _WORDS.get(value.strip().lower(), value.strip())
        value = int(value) if value in ("0", "1", "2") else value
    return int(value) if isinstance(value, bool | int) and value in (0, 1, 2) else None


class Agreement(NamedTuple):
    """How a scorer's decisions and a person's labels agree on the same texts.

    `matrix[i][j]` counts the texts of label i that the scorer puts into category j. `kappa` is None where it is not
    defined, because both use one category only. `missing` texts have a label and no score.
    """

    categories: tuple[str, ...]
    matrix: list[list[int]]
    accuracy: float
    kappa: float | None
    interval: tuple[float, float] | None
    labels: int
    missing: int

    @property
    def few(self) -> bool:
        """Whether there are too few labels to rely on the figures."""
        return self.labels - self.missing < FEW

    def value(self) -> dict[str, Any]:
        """As JSON values."""
        return {**self._asdict(), "categories": list(self.categories), "few": self.few}


def agreement(labels: Labels, decisions: Sequence[int | None], *, graded: bool, seed: int = 0) -> Agreement:
    """The agreement of decisions with labels, text by text.

    `graded`: the decisions are of three levels, 0 to 2. They are compared as such if the labels are too; else both as
    no and yes, where 1 and 2 are yes.
    """
    levels = 3 if graded and labels.graded else 2
    pairs = [
        (min(text.label, levels - 1), min(decision, levels - 1))
        for text, decision in zip(labels.texts, decisions, strict=True)
        if decision is not None
    ]
    matrix = [[pairs.count((i, j)) for j in range(levels)] for i in range(levels)]
    correct = sum(matrix[i][i] for i in range(levels))
    return Agreement(
        ("0", "1", "2") if levels == 3 else ("no", "yes"),
        matrix,
        correct / len(pairs) if pairs else 0.0,
        cohens_kappa(matrix),
        _interval(pairs, levels, seed),
        len(labels.texts),
        len(labels.texts) - len(pairs),
    )


def cohens_kappa(matrix: Sequence[Sequence[int]]) -> float | None:
    """Cohen's kappa of a square confusion matrix: (p_o - p_e) / (1 - p_e) (Cohen 1960, eq. 1); None where p_e is 1."""
    total = sum(map(sum, matrix))
    if not total:
        return None
    rows, columns = [sum(row) for row in matrix], [sum(column) for column in zip(*matrix, strict=True)]
    observed = sum(row[i] for i, row in enumerate(matrix)) / total
    expected = sum(a * b for a, b in zip(rows, columns, strict=True)) / total**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def _interval(pairs: Sequence[tuple[int, int]], levels: int, seed: int) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of kappa over texts, without resamples for which it is not defined."""
    if not pairs:
        return None
    import torch

    generator = torch.Generator().manual_seed(child_seed(seed, "kappa"))
    cells = torch.tensor([i * levels + j for i, j in pairs])
    drawn = cells[torch.randint(len(cells), (RESAMPLES, len(cells)), generator=generator)]
    counts = torch.stack([(drawn == cell).sum(1) for cell in range(levels**2)], 1).double().view(-1, levels, levels)
    shares = counts / len(cells)
    observed = shares.diagonal(dim1=1, dim2=2).sum(1)
    expected = (shares.sum(1) * shares.sum(2)).sum(1)
    defined = expected < 1
    if int(defined.sum()) < RESAMPLES / 2:
        return None
    kappas = ((observed - expected) / (1 - expected))[defined]
    low, high = torch.quantile(kappas, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
