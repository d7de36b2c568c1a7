"""Reads example files, and reports all problems of all files at once, before a model is loaded.

`layouts` splits a file into values, and `formats` makes examples of a value.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from probes.data import formats, layouts
from probes.data.examples import Example
from probes.data.fields import group_of
from vectors.errors import ExampleError, shortened
from vectors.storage.files import digest_bytes

SHOWN = 20  # most problems of one input that are printed

Source = str | Path | Sequence[str | dict[str, Any]]  # a file of JSON lines, or a list of the values of its lines


class Contrast(NamedTuple):
    """The two classes. `paired`: positive i and negative i are a pair. `digests` are of the files' contents."""

    positive: list[Example]
    negative: list[Example]
    paired: bool
    digests: dict[str, str]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # how the examples were read


def read(pos: Source | None = None, neg: Source | None = None, pairs: Source | None = None) -> Contrast:
    """The examples of two sources, or of one that holds both classes. Raises ExampleError with all their problems."""
    if pairs is not None:
        if pos is not None or neg is not None:
            raise ExampleError(
                "--pairs holds both classes, so it can't be combined with --pos and --neg", "leave out --pos and --neg"
            )
        return _read_both_classes(pairs)
    if pos is None or neg is None:
        missing = "--neg is" if neg is None else "--pos is"
        problem = "there are no examples" if pos is neg else f"one class only: {missing} missing"
        raise ExampleError(problem, "give --pos FILE and --neg FILE, or --pairs FILE")
    sides, problems = [], []
    for flag, source in (("--pos", pos), ("--neg", neg)):
        try:
            sides.append(_one_class(flag, _examples(source, flag)))
        except ExampleError as error:
            problems.append(error)
    if problems:
        raise ExampleError([p for error in problems for p in error.problems], problems[0].hint)
    (_, positive, positive_digest, kind), (_, negative, negative_digest, other_kind) = sides
    if kind != other_kind:
        raise ExampleError(
            f"{_name(pos, '--pos')} and {_name(neg, '--neg')} mix formats: {kind} and {other_kind}, "
            "so the two classes would differ in their form",
            "write both in one form",
        )
    if positive_digest == negative_digest or {e.content for e in positive} == {e.content for e in negative}:
        raise ExampleError(
            f"{_name(pos, '--pos')} and {_name(neg, '--neg')} hold the same examples, so there is no contrast",
            "give two different files",
        )
    # Empty contexts (conversations of one message) are all equal, so they say nothing about pairs.
    paired = len(positive) == len(negative) and all(
        p.context and p.context == n.context for p, n in zip(positive, negative, strict=True)
    )
    digests = {"positive": positive_digest, "negative": negative_digest}
    return Contrast(positive, negative, paired, digests, _shared(positive, negative))


def read_class(source: Source, flag: str) -> tuple[list[Example], str]:
    """The examples of one source of one class, and its digest. Raises ExampleError with all their problems."""
    checked = _one_class(flag, _examples(source, flag))
    return checked.examples, checked.digest


def read_prompts(path: Path) -> tuple[list[str], str]:
    """The prompts of a file, one per line (a JSON string, or an object with a "prompt"), and the file's digest.

    A JSON array, a table with a column `prompt`, and a .txt file with a prompt per line are read too. A prompt that
    stands there twice counts once.

    Raises ExampleError with every bad line.
    """
    prompts, digest = prompt_lines(path)
    return list(dict.fromkeys(prompts)), digest


def prompt_lines(path: Path) -> tuple[list[str], str]:
    """As `read_prompts`, but with each prompt as often as it stands in the file."""
    content = read_bytes(path)
    text = layouts.decoded(path, content)
    prompts: list[str] = []
    problems: list[str] = []
    records = layouts.records(str(path), text)
    for record in records:
        value = record.value
        prompt = value.get("prompt", value.get("text")) if isinstance(value, dict) else value
        if record.problem:
            problems.append(f"{record.origin}: {record.problem}")
        elif isinstance(prompt, str) and prompt.strip():
            prompts.append(prompt)
        else:
            problems.append(f"{record.origin}: no prompt")
    if not prompts and not problems:
        problems.append(f"{path} is empty")
    if problems:
        hint = layouts.likely(records, text)
        raise ExampleError(problems[:SHOWN], hint or 'one prompt per line: a JSON string, or {"prompt": "..."}')
    return prompts, digest_bytes(content)


def _name(source: Source, flag: str) -> str:
    """The name of a source in messages: its path, or the flag."""
    return str(source) if isinstance(source, str | Path) else flag


class _Read(NamedTuple):
    """A source that was read: its name, its examples, the digest of its content, and the format of its lines."""

    name: str
    examples: list[Example]
    digest: str
    kind: str


def _one_class(flag: str, source: _Read) -> _Read:
    """Check that a source given for one class does not hold two; returns it. Raises ExampleError."""
    name, examples, *_ = source
    labels = {example.label for example in examples}
    if len(labels) > 1 or any(example.pair for example in examples):
        positive = sum(example.label is True for example in examples)
        raise ExampleError(
            f"{name} holds both classes ({positive} positive, {len(examples) - positive} negative), "
            f"but was given as {flag}",
            f"give it alone: --pairs {name}",
        )
    written = Counter(example.stated for example in examples if example.stated)
    if len(written) > 1 and labels == {None}:
        listed = shortened([f"{label!r} ({count})" for label, count in written.most_common()])
        raise ExampleError(
            f"{name} holds {len(written)} classes, but was given as {flag}: {listed}",
            "write one class into the file, or leave out the label",
        )
    if flag in ("--pos", "--neg") and labels == {flag == "--neg"}:
        side = "negative" if flag == "--pos" else "positive"
        raise ExampleError(
            f"the labels in {name} say that its examples are {side}, but it was given as {flag}",
            "exchange the two files",
        )
    return source


def _read_both_classes(source: Source) -> Contrast:
    path, examples, digest, _ = _examples(source, "--pairs")
    unlabelled = [example for example in examples if example.label is None]
    if unlabelled and unlabelled[0].stated:
        written = Counter(example.stated for example in examples)
        listed = shortened([f"{label!r} ({count})" for label, count in written.most_common()])
        raise ExampleError(
            f"{unlabelled[0].origin}: the label {unlabelled[0].stated!r} says neither positive nor negative; "
            f"{path} has {listed}",
            "write 1 and 0, true and false, or positive and negative; or two files, with --pos and --neg",
        )
    if unlabelled:
        raise ExampleError(
            f"{unlabelled[0].origin}: the line does not say which class it belongs to ({len(unlabelled)} such lines)",
            'with --pairs a line is {"prompt","positive","negative"} or {"prompt","chosen","rejected"}; '
            "for two files use --pos and --neg",
        )
    positive = [example for example in examples if example.label]
    negative = [example for example in examples if not example.label]
    if not positive or not negative:
        which = "negative" if positive else "positive"
        raise ExampleError(f"{path} holds one class only: no {which} example", "both classes are needed")
    if {e.content for e in positive} == {e.content for e in negative}:
        raise ExampleError(f"{path} holds the same examples as positive and as negative", "the two sides must differ")
    paired = len(positive) == len(negative) and all(
        p.pair is not None and p.pair == n.pair for p, n in zip(positive, negative, strict=True)
    )
    return Contrast(positive, negative, paired, {"pairs": digest}, _shared(positive, negative), _said(path, examples))


def _said(path: str, examples: Sequence[Example]) -> tuple[str, ...]:
    """A sentence about which labels are which class, where lines have labels."""
    written: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for example in examples:
        if example.stated and example.label is not None:
            written[example.label][example.stated] += 1
    if not written[True] or not written[False]:
        return ()
    sides = (", ".join(f"{label} ({count})" for label, count in written[side].items()) for side in (True, False))
    return ("in {}, the label {} is the positive class and {} the negative".format(path, *sides),)


def _shared(positive: Sequence[Example], negative: Sequence[Example]) -> tuple[str, ...]:
    both = {e.content for e in positive} & {e.content for e in negative}
    if not both:
        return ()
    example = next(e for e in positive if e.content in both)
    return (f"{len(both)} of the examples stand in both classes (the first at {example.origin})",)


def _examples(source: Source, flag: str) -> _Read:
    """Read a source. Raises ExampleError with every bad line."""
    path = _name(source, flag)
    if isinstance(source, str | Path):
        text = layouts.decoded(Path(path), read_bytes(Path(path)))
        records = layouts.records(path, text)
    else:
        text = _lines(source, flag)
        records = layouts.lines(flag, text)
    examples: list[Example] = []
    problems: list[str] = []
    first_of_kind: dict[str, str] = {}
    for record in records:
        try:
            if record.problem:
                raise ValueError(record.problem)
            parsed, kind = _parse(record.value, record.origin)
            examples += parsed
            first_of_kind.setdefault(kind, record.origin.removeprefix(f"{path}:"))
        except ValueError as error:
            problems.append(f"{record.origin}: {error}")
    if len(first_of_kind) > 1:
        kinds = ", ".join(
            f"{kind} ({where if ' ' in where else f'line {where}'})" for kind, where in first_of_kind.items()
        )
        problems.append(f"{path} mixes formats: {kinds}")
    if problems:
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        forms = ", ".join(module.SHAPE for module in formats.available().values())
        hint = f"one JSON value a line, all of one form: a plain string, {forms}"
        raise ExampleError(problems[:SHOWN] + more, layouts.likely(records, text) or hint)
    if not examples:
        raise ExampleError(f"{path} is empty", "write one example a line")
    return _Read(path, examples, digest_bytes(text.encode()), next(iter(first_of_kind)))


def read_bytes(path: Path) -> bytes:
    """The bytes of a file. Raises ExampleError."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ExampleError(f"there is no file {path}", "check the path") from error
    except OSError as error:
        raise ExampleError(f"{path} can't be read: {error.strerror}", "check the path") from error


def _lines(source: Sequence[str | dict[str, Any]], flag: str) -> str:
    """A list of examples as the text of a JSON lines file. Raises ExampleError."""
    try:
        return "\n".join(map(json.dumps, source))
    except (TypeError, ValueError, RecursionError) as error:
        raise ExampleError(
            f"{flag}: not every example is a JSON value: {error}", "give texts or dictionaries"
        ) from error


def _parse(record: Any, origin: str) -> tuple[list[Example], str]:
    """The examples of one value, and the name of its format. Raises ValueError."""
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, dict):
        raise ValueError(f"a line must be a text or an object, not {json.dumps(record)[:40]}")
    # The form with the most keys wins: a line of the persona form could also have a "text".
    matching = [
        (len(module.KEYS), name) for name, module in formats.available().items() if record.keys() >= module.KEYS
    ]
    if not matching:
        raise ValueError(f"no known form has the keys {', '.join(sorted(record)) or '(none)'}")
    name = max(matching)[1]
    parsed = formats.available()[name].parse(record, origin)
    group = group_of(record)
    return [example._replace(group=group) for example in parsed] if group else parsed, name
