"""Items from files of examples: contrasting pairs or classes, and multiple-choice questions in two public formats."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from probes.data import layouts
from probes.data.examples import Example
from probes.data.fields import group_of, text
from probes.data.reading import SHOWN, Contrast, Source, read_bytes
from probes.data.reading import read as read_contrast
from probes.seeds import child_seed
from steer.evaluation.suites.items import Choice, Item, Pair, Prompt, Side
from steer.evaluation.suites.sides import content_of, held_out_groups, identifier, side_of, subject_of, with_sides
from vectors.errors import ExampleError
from vectors.storage.files import digest_bytes, digest_json

_OPTION = re.compile(r"\n\s*\(([A-Z])\)\s*")
_CHOICES = re.compile(r"\s*Choices:\s*\Z", re.IGNORECASE)


def pairs_of(
    pos: Source | None, neg: Source | None, pairs: Source | None, seed: int
) -> tuple[tuple[Item, ...], dict[str, str], list[str]]:
    """The pairs of example files with their sides, the files' digests, and notes.

    Examples without a partner are paired by a hash of their content within each side, so that adding one moves no
    other to the other side; within a group where both classes have groups, since a pair of two groups would make them
    depend on each other. Raises ExampleError.
    """
    contrast = read_contrast(pos, neg, pairs)
    notes = [*contrast.notes, *contrast.warnings]
    if contrast.paired:
        partners = list(zip(contrast.positive, contrast.negative, strict=True))
        items = [Pair(*pair, group=group) for pair, group in zip(partners, _groups_of(partners), strict=True)]
        return with_sides([item._replace(id=identifier(item)) for item in items], seed), contrast.digests, notes
    held_out = held_out_groups([example.group for example in (*contrast.positive, *contrast.negative)], seed)
    grouped = all(any(e.group for e in examples) for examples in (contrast.positive, contrast.negative))
    matched: list[Item] = []
    for side in ("dev", "test"):
        left = {"positive": 0, "negative": 0}
        for positive, negative in _of_side(contrast, side, held_out, grouped, seed):
            matched += [
                Pair(p, n, side=side, group=p.group or n.group) for p, n in zip(positive, negative, strict=False)
            ]
            left["positive"] += max(0, len(positive) - len(negative))
            left["negative"] += max(0, len(negative) - len(positive))
        where = " in their group" if grouped else ""
        notes += [
            f"{count} {name} examples of the {side} side have no partner{where} and are left out"
            for name, count in left.items()
            if count
        ]
    if not matched and grouped:
        problem = "no group has both positive and negative examples, on one side at least"
        raise ExampleError(problem, "name the groups alike in both files, or leave them out")
    if not matched:
        raise ExampleError("no positive and negative example are on the same side", "give more examples, or --seed")
    return tuple(item._replace(id=identifier(item)) for item in matched), contrast.digests, notes


def _of_side(
    contrast: Contrast, side: Side, held_out: Container[str], grouped: bool, seed: int
) -> list[tuple[list[Example], list[Example]]]:
    """The examples of one side, group by group if they are `grouped`, in the order of a hash; a text that stands twice
    counts once."""
    sides: list[dict[str, list[Example]]] = []
    for examples in (contrast.positive, contrast.negative):
        by_content = {
            digest_json(content_of(e)): e
            for e in examples
            if ("test" if e.group in held_out else side_of(subject_of(e), seed)) == side
        }
        by_group: dict[str, list[Example]] = {}
        for key in sorted(by_content, key=lambda key: child_seed(seed, "partner", key)):
            by_group.setdefault(by_content[key].group if grouped else "", []).append(by_content[key])
        sides.append(by_group)
    positive, negative = sides
    return [(positive.get(group, []), negative.get(group, [])) for group in sorted({*positive, *negative})]


def _groups_of(pairs: Sequence[tuple[Example, Example]]) -> list[str]:
    """The group of each pair, "" where there is none; the two groups that a pair names are one."""
    leader: dict[str, str] = {}

    def lead(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for p, n in pairs:
        if p.group and n.group:
            first, second = sorted((lead(p.group), lead(n.group)))
            leader[second] = first
    return [lead(p.group or n.group) for p, n in pairs]


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
            items.append(item._replace(id=identifier(item), origin=record.origin))
        except ValueError as error:
            problems.append(f"{record.origin}: {error}")
    if not items and not problems:
        problems.append(f"{path} is empty")
    if problems:
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        hint = 'a line is {"question","answer_matching_behavior","answer_not_matching_behavior"}'
        raise ExampleError(problems[:SHOWN] + more, hint)
    return with_sides(items, seed), digest_bytes(content)


def choice_of(record: dict[str, Any]) -> Choice:
    """One line as a choice. Raises ValueError."""
    question = text(record, "question")
    matching = text(record, "answer_matching_behavior").strip()
    other = text(record, "answer_not_matching_behavior").strip()
    group = group_of(record)
    if matching == other:
        raise ValueError(f"both answers are {matching!r}")
    parts = _OPTION.split(question)
    letters, options = parts[1::2], [part.strip() for part in parts[2::2]]
    if not options:
        ordered = tuple(sorted((matching, other), reverse=True))  # Yes before No, whichever matches
        return Choice(question.strip(), ordered, ordered.index(matching), letters=False, group=group)
    answer = matching.strip("()")
    if letters != [chr(ord("A") + index) for index in range(len(letters))] or answer not in letters:
        raise ValueError(f"the answer {matching!r} is none of the options ({', '.join(letters)})")
    asked = _CHOICES.sub("", parts[0]).strip()
    return Choice(asked, tuple(options), letters.index(answer), group=group)


def prompts_of(texts: Sequence[str], group: str = "") -> tuple[Prompt, ...]:
    """Prompts from texts, each once."""
    return tuple(
        Prompt(text, group, digest_json(text.strip()).removeprefix("sha256:")[:12]) for text in dict.fromkeys(texts)
    )
