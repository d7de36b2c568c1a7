"""The ids of a model's tokens, from the files of its tokenizer; and whether all inputs of a merge share them.

An embedding has a row per id, so averaging rows by position is right only where every token has the same id in all
models. Tokens that a tokenizer's vocabulary lacks count too: those of added_tokens.json and tokenizer_config.json, and
special tokens that have a name there and no id, to which transformers gives the next free ones when it loads them.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from merges.inputs import heads
from merges.inputs.sources import Source
from vectors.documents import json_text
from vectors.documents.json_text import read_bounded
from vectors.documents.schema import either, list_of, optional, problems_of, record, text, whole
from vectors.errors import ModelError, shortened
from vectors.storage.files import digest_bytes, digest_json
from vectors.storage.links import fault_of

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
         "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "tekken.json", "chat_template.jinja",
         "chat_template.json")  # fmt: skip
ALLOWED = "vocabulary"  # the name under which `allow_config` lets rows be merged by position


_OF_TOWERS = re.compile(r"<\|?(image|video|vision|audio)[a-z_]*\|?>")  # placeholders for what is not text
TOKENIZER_VALUES = 8_000_000  # of a tokenizer.json; those of 256,000 tokens have 2,000,000
_VOCABULARY = either(
    lambda value, name: iter(()) if isinstance(value, dict | list) else iter(["no"]), wanted="an object or a list"
)
_TOKENIZER = record(
    {"model": record({"vocab": _VOCABULARY})},
    {"added_tokens": optional(list_of(record({"content": text(), "id": whole(0, 2**31 - 1)})))},
)


class Tokens(NamedTuple):
    """The tokens of a model: their ids, the special ones by their role, and the entries of added ones."""

    ids: dict[str, int]
    roles: dict[str, str]
    details: dict[str, dict[str, Any]]  # as tokenizer.json writes added tokens
    stored: frozenset[str]  # those that tokenizer.json itself has


def tokens_of(folder: Path) -> Tokens | None:
    """The tokens of a model folder; None where it has no tokenizer. Raises ModelError for files that can't be read."""
    faults = {path: fault_of(folder, path) for path in _files(folder) if not path.name.startswith("chat_template")}
    outside = [f"{path} can't be copied: it is {reason}" for path, reason in faults.items() if reason]
    if outside:
        raise ModelError(outside, "replace it by a copy of the file that is meant: cp -L")
    try:
        return _read(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"the tokenizer of {folder} can't be read: {reason}", "fetch the model again") from error


def digest(folder: Path) -> str:
    """A digest of the files of a tokenizer and its chat template, without those that are missing."""
    return digest_json(
        {path.name: digest_bytes(path.read_bytes()) for path in _files(folder) if not fault_of(folder, path)}
    )


def _files(folder: Path) -> list[Path]:
    """The files of a tokenizer."""
    named = [folder / name for name in FILES] + sorted(folder.glob("*.tiktoken"))
    return [path for path in named if path.is_file()]


def _read(folder: Path) -> Tokens | None:
    details: dict[str, dict[str, Any]] = {}
    ids: dict[str, int] = {}
    if (folder / "tokenizer.json").is_file():
        ids, details = _stored(folder / "tokenizer.json")
    else:
        ids = dict(_older(folder))
    if not ids:
        return None
    stored = frozenset(ids)
    config, roles_file = _json(folder / "tokenizer_config.json"), _json(folder / "special_tokens_map.json")
    for number, entry in (config.get("added_tokens_decoder") or {}).items():
        ids.setdefault(entry["content"], int(number))
        details.setdefault(entry["content"], dict(entry))
    for token, number in _json(folder / "added_tokens.json").items():
        ids.setdefault(token, int(number))
    roles = {}
    for role in ROLES:
        named_token = _text(config.get(role)) or _text(roles_file.get(role))
        if named_token:
            roles[role] = named_token
    named = [*roles.values(), *_texts(config.get("additional_special_tokens") or config.get("extra_special_tokens"))]
    for token in named:
        if token not in ids:
            ids[token] = max(ids.values()) + 1
            details.setdefault(token, {"special": True})
    if not all(isinstance(token, str) and type(number) is int and 0 <= number < 2**31 for token, number in ids.items()):
        raise ValueError("it holds a token that is not text, or an id that is not a whole number")
    return Tokens(ids, roles, details, stored)


def _stored(path: Path) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """The ids of a tokenizer.json, and its entries of added tokens. Raises ModelError."""
    content = json_text.read(path, ModelError, "fetch the model again", values=TOKENIZER_VALUES)
    problems = problems_of(content, _TOKENIZER)
    known: dict[str, int] = {}
    if not problems:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            known = dict(vocabulary)
        else:
            known = {entry[0]: i for i, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
            if len(known) != len(vocabulary):
                problems.append("model.vocab holds an entry that is no token, or one twice")
        # Without the checks of the schema, which would take long for half a million entries.
        if not all(isinstance(token, str) and type(i) is int and 0 <= i < 2**31 for token, i in known.items()):
            problems.append("model.vocab holds a token whose id is not a whole number")
    if problems:
        raise ModelError([f"{path} is damaged: {problem}" for problem in problems], "fetch the model again")
    details = {entry["content"]: entry for entry in content.get("added_tokens") or []}
    return known | {token: entry["id"] for token, entry in details.items()}, details


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = json_text.parse(read_bounded(path, json_text.LARGEST), values=TOKENIZER_VALUES)
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return value


def _text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _texts(value: Any) -> list[str]:
    listed = list(value.values()) if isinstance(value, dict) else value or []
    return [token for item in listed if (token := _text(item))]


def _older(folder: Path) -> Iterator[tuple[str, int]]:
    """The vocabulary of a tokenizer without tokenizer.json."""
    if (folder / "vocab.json").is_file():
        yield from _json(folder / "vocab.json").items()
    elif (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        yield from ((token, i) for i, token in enumerate(lines))
    elif (folder / "tekken.json").is_file():
        content = _json(folder / "tekken.json")
        special = content.get("special_tokens") or []
        first = int((content.get("config") or {}).get("default_num_special_tokens", len(special)))
        yield from ((entry["token_str"], int(entry["rank"])) for entry in special)
        yield from ((f"bytes {entry['token_bytes']}", first + int(entry["rank"])) for entry in content["vocab"])
    elif pieces := next((p for p in (folder / "tokenizer.model", folder / "spiece.model") if p.is_file()), None):
        content_ = pieces.read_bytes()
        yield from ((piece, i) for i, piece in enumerate(_pieces(content_)))
    else:
        for path in sorted(folder.glob("*.tiktoken"))[:1]:
            for line in path.read_bytes().splitlines():
                token, _, rank = line.partition(b" ")
                yield f"bytes {base64.b64decode(token).hex()}", int(rank)


def _pieces(content: bytes) -> Iterator[str]:
    """The pieces of a SentencePiece model, in the order of their ids: field 1 of the message, and there field 1."""
    for field, value in _fields(content):
        if field == 1 and isinstance(value, bytes):
            piece = next((v for f, v in _fields(value) if f == 1 and isinstance(v, bytes)), None)
            if piece is None:
                raise ValueError("the SentencePiece model is damaged")
            yield piece.decode()


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer: their numbers and values. Raises ValueError."""
    at = 0

    def varint() -> int:
        nonlocal at
        result = shift = 0
        while True:
            if at >= len(content) or shift > 63:
                raise ValueError("the SentencePiece model is damaged")
            byte = content[at]
            at, result, shift = at + 1, result | (byte & 127) << shift, shift + 7
            if byte < 128:
                return result

    while at < len(content):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        length = {1: 8, 5: 4}.get(kind) or (varint() if kind == 2 else -1)
        if length < 0 or at + length > len(content):
            raise ValueError("the SentencePiece model is damaged")
        at += length
        yield key >> 3, content[at - length : at]


class Agreement(NamedTuple):
    """The result of a comparison: problems, for which a merge is refused, and notes for the user."""

    problems: list[str]
    notes: list[str]


def compare(
    main: Source, others: Sequence[Source], allowed: Sequence[str] = (), *, matched: bool = False, models: bool = True
) -> Agreement:
    """Compare the tokens of models with those of `main`, whose tokenizer the result takes.

    With `matched`, rows are matched by token, so that ids may differ. `models` is whether a model is merged; without,
    the result has the base's rows, whatever they are.
    """
    problems: list[str] = []
    notes: list[str] = []
    ours = tokens_of(main.path)
    embedding = heads.embedding_of(main.entries)
    rows = main.entries[embedding].shape[0] if embedding is not None else None
    if matched or rows is None:
        return Agreement(problems, notes)
    if ours is not None:
        highest = max(ours.ids, key=ours.ids.__getitem__)
        beyond = (
            f"the tokenizer of {main.reference} has ids up to {ours.ids[highest]} ({highest!r}), "
            f"its embedding {rows} rows"
        )
        if ours.ids[highest] >= rows and models and ALLOWED not in allowed and not _never_used(main, ours.ids, rows):
            problems.append(beyond)
        elif ours.ids[highest] >= rows:
            notes.append(beyond)
        elif rows - 1 > ours.ids[highest] and models:
            spare = rows - 1 - ours.ids[highest]
            notes.append(f"the last {spare} row(s) of the embedding have no token in {main.reference}; they are kept")
    without = [main.reference] * (ours is None)
    for other in others:
        theirs = tokens_of(other.path)
        if theirs is None:
            without.append(other.reference)
        elif ours is not None:
            sentence = _difference(main.reference, ours.ids, other.reference, theirs.ids)
            if sentence and ALLOWED in allowed:
                notes.append(f"{sentence}: rows are merged by their position, as allowed")
            elif sentence:
                problems.append(f"vocabularies differ: {sentence}")
            for role in ROLES:
                if ours.roles.get(role) != theirs.roles.get(role) and not sentence:
                    notes.append(
                        f"the {role.replace('_', ' ')} is {theirs.roles.get(role)!r} in {other.reference}; the result "
                        f"has that of {main.reference}, {ours.roles.get(role)!r}"
                    )
    if without and len(without) <= len(others):
        notes.append(f"no tokenizer in {shortened(without)}: its embedding's rows are taken to be of the same tokens")
    return Agreement(problems, notes)


def _never_used(main: Source, ids: Mapping[str, int], rows: int) -> bool:
    """Whether the tokens without a row stand for images or sounds alone, in a model of text alone.

    Such a model shares the tokenizer of larger ones: Gemma 3 1B has `<image_soft_token>` one beyond its last row.
    """
    towers = any(word in key for key in main.config for word in ("vision", "audio"))
    return not towers and all(_OF_TOWERS.fullmatch(token) for token, number in ids.items() if number >= rows)


def only_added(folder: Path, other: Path) -> bool:
    """Whether two vocabularies differ only in tokens whose ids stand for no token in the other model."""
    ours, theirs = tokens_of(folder), tokens_of(other)
    if ours is None or theirs is None:
        return False
    names = {number: token for token, number in ours.ids.items()}
    return all(
        names.get(number, token) == token and ours.ids.get(token, number) == number
        for token, number in theirs.ids.items()
    )


def _difference(ours_name: str, ours: Mapping[str, int], theirs_name: str, theirs: Mapping[str, int]) -> str:
    """How two vocabularies differ, in a sentence; empty if they do not."""
    if ours == theirs:
        return ""
    renumbered = sorted((token for token in ours.keys() & theirs if ours[token] != theirs[token]), key=ours.__getitem__)
    parts = [f"{token!r} is {ours[token]} in {ours_name}, {theirs[token]} in {theirs_name}" for token in renumbered[:2]]
    parts += [f"{len(renumbered) - 2} more tokens have other ids"] * (len(renumbered) > 2)
    for name, mine, other in ((ours_name, ours, theirs), (theirs_name, theirs, ours)):
        only = sorted(mine.keys() - other, key=mine.__getitem__)
        if only:
            parts.append(f"only {name} has {shortened([repr(token) for token in only])}")
    return "; ".join(parts)
