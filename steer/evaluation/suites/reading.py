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

from collections.abc import Iterator, Mapping
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
from vectors.documents.schema import Check, boolean, list_of, one_of, problems_of, strict, text
from vectors.errors import ExampleError, SteerError, UsageError, collecting, raise_together
from vectors.storage.files import digest_bytes

_TEXT = text(r"[\s\S]*\S[\s\S]*", "text that is not blank")
_COMMON: dict[str, Check] = {"group": text(longest=1000), "id": text(longest=1000)}
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
    listed = [_scored(entry) for entry in value.get("items", ()) if entry["kind"] in ("pair", "choice")]
    different, _ = without_copies(listed)
    problems = _repeated([entry.id for entry in different])
    if problems:
        raise ExampleError([f"{path}: {problem}" for problem in problems], "give each item an id of its own")
    files = {name: path.parent / file for name, file in value.get("files", {}).items()}
    more = _of_files(Sources(**files), seed) if files else Suite("", ())
    prompts = {
        kind: tuple(
            Prompt(entry["prompt"], entry.get("group", ""), entry.get("id", ""))
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


def _scored(entry: Mapping[str, Any]) -> Item:
    """A pair or a choice of the document."""
    group, name = entry.get("group", ""), entry.get("id", "")
    item: Item
    if entry["kind"] == "pair":
        prompt = entry.get("prompt")
        item = Pair(Example(entry["positive"], prompt), Example(entry["negative"], prompt), group=group)
    else:
        options = tuple(entry["options"])
        positive = options.index(entry["positive"])
        item = Choice(entry["question"], options, positive, entry.get("letters", True), group=group)
    return item._replace(id=name or identifier(item))


def _repeated(ids: list[str]) -> list[str]:
    return [
        f"{ids.count(name)} different items have the id {name!r}" for name in dict.fromkeys(ids) if ids.count(name) > 1
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
