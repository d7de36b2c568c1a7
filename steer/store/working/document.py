"""`personality.yaml`, the file that people edit: read with all its problems, edited with its comments and order."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from steer.store.blobs import DIGEST
from steer.store.objects.model import NAME
from vectors.documents import json_text, yaml_text
from vectors.documents.schema import (
    anything,
    boolean,
    either,
    excerpt,
    list_of,
    mapping_of,
    number,
    one_of,
    optional,
    problems_of,
    strict,
    text,
)  # fmt: skip
from vectors.errors import ArtifactError, SteerError, UsageError, guess
from vectors.expression import OPERATIONS, parse
from vectors.language.terms import RESPONSE
from vectors.registry.layers import parse_layers
from vectors.storage.files import write_atomically

LARGEST = 1_000_000  # bytes
NEW = """\
# A personality: a base model and what is added to it. Commands edit this file (steer add, set, rm), and so may you.
# An entry of parts:
#   - name: warm            # warm.safetensors in this folder, or path: FILE, or digest: sha256:…
#     strength: 1.2
#     layers: 12-15         # by default where the vector acts
#     scope: response       # prompt, response, first:8, after:8; by default everywhere
# Further keys: serve: (defaults of sampling, such as temperature: 0.7), merge: (how task vectors are combined),
# evals: (what a promotion needs, such as - suite: warm.yaml).
base: {base}
parts: []
"""


Change = Callable[[Any], None]


class Entry(NamedTuple):
    """An entry of `parts:`; a name without path and digest stands for NAME.safetensors or a name of the store."""

    name: str
    path: str | None = None
    digest: str | None = None
    strength: float | None = None
    layers: tuple[int, ...] | None = None
    scope: str | None = None
    condition: str | None = None
    operation: str = "add"


class Document(NamedTuple):
    """What `personality.yaml` says."""

    base: str
    base_digest: str | None
    parts: tuple[Entry, ...]
    merge: Mapping[str, Any]
    serve: Mapping[str, Any]
    evals: tuple[Mapping[str, Any], ...]


def _layers(value: Any, name: str) -> Iterator[str]:
    try:
        _parsed_layers(value)
    except (SteerError, ValueError, TypeError):
        yield f"{name} is {excerpt(value)}, not layers such as 12-15"


def _scope(value: Any, name: str) -> Iterator[str]:
    try:
        if not isinstance(value, str) or parse(f"x@{value}").conditions:
            raise ValueError
    except (SteerError, ValueError):
        yield f"{name} is {excerpt(value)}, not a scope such as response or first:8"


def _condition(value: Any, name: str) -> Iterator[str]:
    try:
        term = parse(f"x@{value}").terms[0] if isinstance(value, str) else None
        if term is None or not term.conditions or term.scope != RESPONSE:
            raise ValueError
    except (SteerError, ValueError):
        yield f"{name} is {excerpt(value)}, not a condition such as when:anger>0.5"


_PART = strict(
    {"name": NAME},
    {
        "digest": optional(text(DIGEST.pattern, "a digest")),
        "path": optional(text(r"[^\x00]{1,4096}", "a path")),
        "strength": optional(number),
        "layers": optional(_layers),
        "scope": optional(_scope),
        "condition": optional(_condition),
        "operation": optional(one_of(*OPERATIONS)),
    },
)
_EVAL = strict({"suite": text(r"[\s\S]{1,4096}", "a path")}, {"minimum": number, "metric": text(longest=200)})
_PLAIN = mapping_of(
    either(number, boolean, text(longest=10_000), list_of(anything, 1000), optional(number), wanted="a plain value")
)
_DOCUMENT = strict(
    {"base": text(r"[\s\S]{1,1000}", "a model")},
    {
        "base_digest": optional(text(DIGEST.pattern, "a digest")),
        "parts": optional(list_of(_PART, 1000)),
        "merge": optional(_PLAIN),
        "serve": optional(_PLAIN),
        "evals": optional(list_of(_EVAL, 1000)),
    },
)


def read(path: Path) -> Document:
    """The document in a file. Raises UsageError where there is none, ArtifactError with all its problems."""
    return parsed(content_of(path), str(path))


def content_of(path: Path) -> str:
    """The text of the file. Raises UsageError, ArtifactError."""
    try:
        return json_text.read_bounded(path, LARGEST).decode("utf-8")
    except FileNotFoundError:
        raise UsageError(f"there is no {path}", "make one: steer init, or steer checkout NAME") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} can't be read: {error}", "check the file") from error


def parsed(content: str, name: str) -> Document:
    """The document in a text. Raises ArtifactError with all its problems."""
    try:
        value = yaml_text.parse(content)
    except ValueError as error:
        raise ArtifactError(f"{name} is not YAML: {error}", "an empty one to compare with: steer init") from error
    problems = problems_of(value, _DOCUMENT)
    entries = [_entry(each) for each in (value.get("parts") or [])] if not problems else []
    names = [entry.name for entry in entries]
    problems += [f"two parts have the name {twice}" for twice in sorted({n for n in names if names.count(n) > 1})]
    problems += [
        f"the part {entry.name} has both a path and a digest that may differ: {entry.path}"
        for entry in entries
        if entry.path and entry.digest and entry.path.startswith("sha256:")
    ]
    if problems:
        raise ArtifactError([f"{name}: {problem}" for problem in problems], "docs/versions.md shows a whole file")
    return Document(
        value["base"], value.get("base_digest"), tuple(entries), value.get("merge") or {}, value.get("serve") or {},
        tuple(value.get("evals") or ()),
    )  # fmt: skip


def _entry(value: Mapping[str, Any]) -> Entry:
    strength = value.get("strength")
    return Entry(
        value["name"], value.get("path"), value.get("digest"), None if strength is None else float(strength),
        _parsed_layers(value.get("layers")), value.get("scope"), value.get("condition"),
        value.get("operation") or "add",
    )  # fmt: skip


def _parsed_layers(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str | list):
        raise TypeError
    listed = parse_layers(",".join(map(str, value)) if isinstance(value, list) else str(value))
    if listed is None:
        raise ValueError
    return tuple(listed)


# ---- edits, which keep comments and order


def edit(path: Path, change: Change) -> None:
    """Change the file by `edited`. Raises as `read` does, OutputError."""
    write_atomically(path, edited(content_of(path), change, str(path)).encode())


def edited(content: str, change: Change, name: str) -> str:
    """A text changed by a function of its value (a ruamel mapping); what it does not touch stays as it is written.

    The result is read again, so that an edit can't break the file. Raises ArtifactError, and what `change` raises.
    """
    from ruamel.yaml import YAML

    parsed(content, name)
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    if re.search(r"^- ", content, re.MULTILINE) is None:
        yaml.indent(mapping=2, sequence=4, offset=2)
    value = yaml.load(content)
    change(value)
    buffer = io.StringIO()
    yaml.dump(value, buffer)
    parsed(buffer.getvalue(), name)
    return buffer.getvalue()


def set_part(path: Path, name: str, fields: Mapping[str, Any]) -> bool:
    """Give a part these fields (None removes one), adding the part if it is new; returns whether it is new."""
    new = name not in [entry.name for entry in read(path).parts]
    edit(path, with_part(name, fields))
    return new


def with_part(name: str, fields: Mapping[str, Any]) -> Change:
    """The change of `set_part`."""

    def change(value: Any) -> None:
        parts = value.get("parts")
        if not parts:
            # An empty list in flow style would stay in one line.
            value["parts"] = parts = _block_list()
        entry = next((each for each in parts if each.get("name") == name), None)
        if entry is None:
            entry = _block_mapping()
            entry["name"] = name
            parts.append(entry)
        for key, field in fields.items():
            if field is None:
                entry.pop(key, None)
            else:
                entry[key] = field

    return change


def with_field(keys: tuple[str, ...], field: Any) -> Change:
    """Set a value below these keys, such as ("serve", "temperature"); None removes it."""

    def change(value: Any) -> None:
        for key in keys[:-1]:
            if not isinstance(value.get(key), Mapping):
                value[key] = _block_mapping()
            value = value[key]
        if field is None:
            value.pop(keys[-1], None)
        else:
            value[keys[-1]] = field

    return change


def in_order(names: list[str]) -> Change:
    """Put the parts into this order of their names."""

    def change(value: Any) -> None:
        parts = value.get("parts") or []
        if [each["name"] for each in parts] != names:
            by_name = {each["name"]: each for each in parts}
            for i, name in enumerate(names):
                parts[i] = by_name[name]

    return change


def quoted(value: str) -> str:
    """A text as YAML, quoted only where it must be."""
    import yaml

    return yaml.safe_dump(value, width=4096, allow_unicode=True).removesuffix("\n").removesuffix("\n...")


def write(path: Path, content: str) -> None:
    """Write the file as it was. Raises OutputError."""
    write_atomically(path, content.encode())


def without_part(name: str) -> Change:
    """Remove a part. Raises UsageError for one that is not there."""

    def change(value: Any) -> None:
        parts = value.get("parts") or []
        names = [each.get("name") for each in parts]
        if name not in names:
            raise UsageError(
                f"there is no part {name!r}{guess(name, names)}", f"the parts are {', '.join(names) or 'none yet'}"
            )
        del parts[names.index(name)]

    return change


def _block_list() -> Any:
    from ruamel.yaml.comments import CommentedSeq

    return CommentedSeq()


def _block_mapping() -> Any:
    from ruamel.yaml.comments import CommentedMap

    return CommentedMap()
