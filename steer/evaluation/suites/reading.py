"""Suites from files: a YAML or JSON document, or files of examples given one by one. All problems are reported at once.

    name: warmth
    items:
      - {kind: pair, prompt: "How was it?", positive: "Lovely!", negative: "Fine.", group: small-talk}
      - {kind: choice, question: "Is it so?", options: [yes, no], positive: yes}
      - {kind: prompt, prompt: "I lost my keys."}
      - {kind: neutral, prompt: "What is an algorithm?"}
    files: {pos: warm.jsonl, neg: cold.jsonl, choices: persona.jsonl, neutral: neutral.jsonl}

Paths are relative to the document.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.data.examples import Example
from probes.data.reading import Source, read_bytes, read_prompts
from steer.evaluation.suites.copies import without_copies
from steer.evaluation.suites.files import choices_of, pairs_of, prompts_of
from steer.evaluation.suites.items import Choice, Item, Pair, Prompt, Suite
from steer.evaluation.suites.sides import identifier, with_sides
from vectors.documents import yaml_text
from vectors.documents.schema import Check, boolean, either, list_of, one_of, problems_of, strict, text, whole
from vectors.errors import ExampleError, SteerError, UsageError, collecting, naming, raise_together
from vectors.storage.files import digest_bytes

_TEXT = text(r"[\s\S]*\S[\s\S]*", "text that is not blank")
_GROUP = either(text(longest=1000), whole(-(2**63), 2**63), wanted="text or a whole number")
_COMMON: dict[str, Check] = {"group": _GROUP, "id": text(longest=1000)}
_KINDS: dict[str, Check] = {
    "pair": strict(
        {"kind": one_of("pair"), "positive": _TEXT, "negative": _TEXT}, {"prompt": _TEXT, **_COMMON}
    ),
    "choice": strict(
        {"kind": one_of("choice"), "question": _TEXT, "options": list_of(_TEXT, longest=26), "positive": _TEXT},
        {"letters": boolean, **_COMMON},
    ),
    "prompt": strict({"kind": one_of("prompt"), "prompt": _TEXT}, _COMMON),
    "neutral": strict({"kind": one_of("neutral"), "prompt": _TEXT}, _COMMON),
}  # fmt: skip
_FILES = ("pos", "neg", "pairs", "choices", "prompts", "neutral")


def _item(value: Any, name: str) -> Iterator[str]:
    """An item of the kind that it states."""
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if kind not in _KINDS:
        yield (
            f"{name}.kind is {kind!r}, not {', '.join(_KINDS)}"
            if isinstance(value, Mapping)
            else (f"{name} is not an item with a kind: {', '.join(_KINDS)}")
        )
        return
    yield from _KINDS[kind](value, name)
    if kind == "choice" and isinstance(value.get("options"), list):
        options = value["options"]
        if len(options) < 2 or len(set(map(str, options))) < len(options):
            yield f"{name}.options are {len(options)}, not at least two different ones"
        elif value.get("positive") not in options:
            yield f"{name}.positive is {value.get('positive')!r}, which is none of its options"
    if kind == "pair" and value.get("positive") is not None and value.get("positive") == value.get("negative"):
        yield f"{name} has the same text as positive and as negative"


DOCUMENT = strict(
    {}, {"name": text(longest=200), "items": list_of(_item), "files": strict({}, dict.fromkeys(_FILES, _TEXT))}
)
_TEXTS = ("name", "id", "group", "positive", "negative", "prompt", "question")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a suite comes from: a document, files, or both."""

    suite: Path | None = None
    pos: Source | None = None
    neg: Source | None = None
    pairs: Source | None = None
    choices: Path | None = None
    prompts: Path | None = None
    neutral: Path | None = None


def read_suite(sources: Sources, seed: int = 0) -> Suite:
    """The suite of these sources, with the side of every item. Raises ExampleError, UsageError with all problems."""
    errors: list[SteerError] = []
    parts: list[Suite] = []
    if sources.suite is not None:
        with collecting(errors):
            parts.append(_document(sources.suite, seed))
    if any(getattr(sources, name) is not None for name in _FILES):
        with collecting(errors):
            parts.append(_of_files(sources, seed))
    if not parts and not errors:
        raise UsageError("there is nothing to evaluate on", "give --suite FILE, or --pos FILE and --neg FILE")
    raise_together(errors)
    items, of_copies = without_copies([item for part in parts for item in part.items])
    if not any((part.items or part.prompts or part.neutral) for part in parts):
        raise ExampleError(f"{sources.suite} holds no item", "add pairs or choices to it; docs/eval.md shows a suite")
    if not items:
        raise ExampleError("the suite has no item that is scored: it holds prompts only", "add pairs or choices to it")
    return Suite(
        parts[0].name,
        tuple(items),
        tuple({prompt.text: prompt for part in parts for prompt in part.prompts}.values()),
        tuple({prompt.text: prompt for part in parts for prompt in part.neutral}.values()),
        {name: digest for part in parts for name, digest in part.digests.items()},
        (*(note for part in parts for note in part.notes), *of_copies),
    )


def _document(path: Path, seed: int) -> Suite:
    content = read_bytes(path)
    try:
        value = yaml_text.parse(content.decode("utf-8-sig"), texts=_TEXTS)
    except (ValueError, UnicodeDecodeError) as error:
        raise ExampleError(f"{path} can't be read: {error}", "write the suite as YAML or JSON") from error
    problems = problems_of(value, DOCUMENT)
    if problems:
        raise ExampleError([f"{path}: {problem}" for problem in problems], "docs/eval.md shows a suite")
    numbered = [(f"items[{i}]", entry) for i, entry in enumerate(value.get("items", ()))]
    listed = [_scored(entry, name) for name, entry in numbered if entry["kind"] in ("pair", "choice")]
    problems = _repeated(without_copies(listed)[0])
    if problems:
        raise ExampleError([f"{path}: {problem}" for problem in problems], "give each item an id of its own")
    files = {name: path.parent / file for name, file in value.get("files", {}).items()}
    more = Suite("", ())
    if files:
        with naming(_keyed, f"{path}: "):
            more = _of_files(Sources(**files), seed)
    prompts = {
        kind: tuple(
            Prompt(entry["prompt"], str(entry.get("group", "")), entry.get("id", ""))
            for entry in value.get("items", ())
            if entry["kind"] == kind
        )
        for kind in ("prompt", "neutral")
    }
    return Suite(
        value.get("name", path.stem),
        (*with_sides(listed, seed), *more.items),
        (*prompts["prompt"], *more.prompts),
        (*prompts["neutral"], *more.neutral),
        {"suite": digest_bytes(content), **more.digests},
        more.notes,
    )


def _keyed(text: str) -> str:
    """A sentence about options as one about the keys of a suite's `files`."""
    return re.sub(r"--(\w+)\b", lambda option: f"files.{option[1]}" if option[1] in _FILES else option[0], text)


def _scored(entry: Mapping[str, Any], origin: str) -> Item:
    """A pair or a choice of the document; `origin` names it in messages."""
    group, name = str(entry.get("group", "")), entry.get("id", "")
    item: Item
    if entry["kind"] == "pair":
        prompt = entry.get("prompt")
        positive, negative = (Example(entry[side], prompt, origin=origin) for side in ("positive", "negative"))
        item = Pair(positive, negative, group=group)
    else:
        options = tuple(entry["options"])
        index, letters = options.index(entry["positive"]), entry.get("letters", True)
        item = Choice(entry["question"], options, index, letters, group=group, origin=origin)
    return item._replace(id=name or identifier(item))


def _repeated(different: Sequence[Item]) -> list[str]:
    places: dict[str, list[str]] = {}
    for item in different:
        places.setdefault(item.id, []).append(item.origin if isinstance(item, Choice) else item.positive.origin)
    return [
        f"{' and '.join(same[:4])} differ and have the id {name!r}" for name, same in places.items() if len(same) > 1
    ]


def _of_files(sources: Sources, seed: int) -> Suite:
    errors: list[SteerError] = []
    items: list[Item] = []
    digests: dict[str, str] = {}
    notes: list[str] = []
    prompts: dict[str, tuple[Prompt, ...]] = {}
    if any(source is not None for source in (sources.pos, sources.neg, sources.pairs)):
        with collecting(errors):
            pairs, of_pairs, notes = pairs_of(sources.pos, sources.neg, sources.pairs, seed)
            items += pairs
            digests |= of_pairs
    if sources.choices is not None:
        with collecting(errors):
            choices, digests["choices"] = choices_of(Path(sources.choices), seed)
            items += choices
    for kind, file in (("prompts", sources.prompts), ("neutral", sources.neutral)):
        if file is not None:
            with collecting(errors):
                texts, digests[kind] = read_prompts(Path(file))
                prompts[kind] = prompts_of(texts)
    raise_together(errors)
    named = next((s for s in (sources.pos, sources.pairs, sources.choices) if isinstance(s, str | Path)), "examples")
    return Suite(
        Path(named).stem, tuple(items), prompts.get("prompts", ()), prompts.get("neutral", ()), digests, tuple(notes)
    )
