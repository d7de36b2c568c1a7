"""Items from files of examples: contrasting pairs or classes, and multiple-choice questions in two public formats."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from probes.data import layouts
from probes.data.examples import Example
from probes.data.fields import text
from probes.data.reading import SHOWN, Contrast, Source, read_bytes
from probes.data.reading import read as read_contrast
from probes.seeds import child_seed
from steer.evaluation.suites.items import Choice, Item, Pair, Prompt, Side
from steer.evaluation.suites.sides import content_of, identifier, side_of, subject_of, with_sides
from vectors.errors import ExampleError
from vectors.storage.files import digest_bytes, digest_json

_OPTION = re.compile(r"\n\s*\(([A-Z])\)\s*")
_CHOICES = re.compile(r"\s*Choices:\s*\Z", re.IGNORECASE)


def pairs_of(
    pos: Source | None, neg: Source | None, pairs: Source | None, seed: int
) -> tuple[tuple[Item, ...], dict[str, str], list[str]]:
    """The pairs of example files with their sides, the files' digests, and notes.

    Examples without a partner are paired by a hash of their content within each side, so that adding one moves no
    other to the other side. Raises ExampleError.
    """
    contrast = read_contrast(pos, neg, pairs)
    groups = {**_groups(pos), **_groups(neg), **_groups(pairs)}
    notes = [*contrast.notes, *contrast.warnings]
    if contrast.paired:
        items = [
            Pair(p, n, group=groups.get(p.origin, ""))
            for p, n in zip(contrast.positive, contrast.negative, strict=True)
        ]
        return with_sides([item._replace(id=identifier(item)) for item in items], seed), contrast.digests, notes
    matched: list[Item] = []
    for side in ("dev", "test"):
        positive, negative = _of_side(contrast, side, seed)
        matched += [
            Pair(p, n, side=side, group=groups.get(p.origin, "")) for p, n in zip(positive, negative, strict=False)
        ]
        left = abs(len(positive) - len(negative))
        if left:
            more = "positive" if len(positive) > len(negative) else "negative"
            notes.append(f"{left} {more} examples of the {side} side have no partner and are left out")
    return tuple(item._replace(id=identifier(item)) for item in matched), contrast.digests, notes


def _of_side(contrast: Contrast, side: Side, seed: int) -> tuple[list[Example], list[Example]]:
    """The examples of one side in the order of a hash; a text that stands twice counts once."""
    sides = []
    for examples in (contrast.positive, contrast.negative):
        by_content = {digest_json(content_of(e)): e for e in examples if side_of(subject_of(e), seed) == side}
        sides.append([by_content[key] for key in sorted(by_content, key=lambda key: child_seed(seed, "partner", key))])
    return sides[0], sides[1]


def _groups(source: Source | None) -> dict[str, str]:
    """The group of each line of a source that states one, by its origin FILE:LINE."""
    if not isinstance(source, str | Path):
        return {}
    path = Path(source)
    try:
        records = layouts.records(str(source), layouts.decoded(path, path.read_bytes()))
    except OSError:
        return {}
    return {
        record.origin: record.value["group"]
        for record in records
        if isinstance(record.value, dict) and isinstance(record.value.get("group"), str)
    }


def choices_of(path: Path, seed: int) -> tuple[tuple[Item, ...], str]:
    """The questions of a file with their sides, and the file's digest. Raises ExampleError with every bad line.

    A line has `question`, `answer_matching_behavior` and `answer_not_matching_behavior`: the yes/no format of Perez et
    al. 2022, or the A/B format of Rimsky et al. 2024, whose question lists the options (A), (B), …
    """
    content = read_bytes(path)
    records = layouts.records(str(path), layouts.decoded(path, content))
    items: list[Item] = []
    problems: list[str] = []
    for record in records:
        try:
            if record.problem:
                raise ValueError(record.problem)
            if not isinstance(record.value, dict):
                raise ValueError("a line must be an object")
            item = choice_of(record.value)
            items.append(item._replace(id=identifier(item)))
        except ValueError as error:
            problems.append(f"{record.origin}: {error}")
    if not items and not problems:
        problems.append(f"{path} is empty")
    if problems:
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        hint = 'a line is {"question","answer_matching_behavior","answer_not_matching_behavior"}'
        raise ExampleError(problems[:SHOWN] + more, hint)
    return with_sides(list({item.id: item for item in items}.values()), seed), digest_bytes(content)


def choice_of(record: dict[str, Any]) -> Choice:
    """One line as a choice. Raises ValueError."""
    question = text(record, "question")
    matching = text(record, "answer_matching_behavior").strip()
    other = text(record, "answer_not_matching_behavior").strip()
    group = record.get("group") if isinstance(record.get("group"), str) else ""
    if matching == other:
        raise ValueError(f"both answers are {matching!r}")
    parts = _OPTION.split(question)
    letters, options = parts[1::2], [part.strip() for part in parts[2::2]]
    if not options:
        ordered = tuple(sorted((matching, other), reverse=True))  # Yes before No, whichever matches
        return Choice(question.strip(), ordered, ordered.index(matching), letters=False, group=str(group))
    answer = matching.strip("()")
    if letters != [chr(ord("A") + index) for index in range(len(letters))] or answer not in letters:
        raise ValueError(f"the answer {matching!r} is none of the options ({', '.join(letters)})")
    asked = _CHOICES.sub("", parts[0]).strip()
    return Choice(asked, tuple(options), letters.index(answer), group=str(group))


def prompts_of(texts: Sequence[str], group: str = "") -> tuple[Prompt, ...]:
    """Prompts from texts, each once."""
    return tuple(
        Prompt(text, group, digest_json(text.strip()).removeprefix("sha256:")[:12]) for text in dict.fromkeys(texts)
    )
