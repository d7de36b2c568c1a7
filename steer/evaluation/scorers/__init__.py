"""Scorers of generated texts, one per file, discovered in this folder and through the entry point `steer.scorers`.

_protocol.py says what a scorer must have. A scorer with its settings is written `KIND:VALUE` or `NAME=KIND:VALUE` on
the command line, where VALUE is its first setting, and as a mapping in a suite:

    {name: apology, kind: regex, pattern: "\\\\bsorry\\\\b"}
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steer.evaluation.scorers._protocol import GeneratedText, Resources, Scored, Scorer
from vectors.documents.schema import excerpt
from vectors.errors import SteerError, UsageError, guess
from vectors.registry import options
from vectors.registry.plugins import choose, discover_as, names

__all__ = ["GeneratedText", "Resources", "Scored", "Scorer"]  # the contract, for those who call scorers
GROUP = "steer.scorers"
_NAMED = re.compile(r"(?:(?P<name>[A-Za-z][\w-]{0,59})=)?(?P<kind>[a-z][a-z_]*)(?::(?P<value>[\s\S]*))?")


class ConfiguredScorer(NamedTuple):
    """A scorer with its settings, under the name that a report gives its figures."""

    name: str
    kind: str
    settings: Any

    def score(self, texts: Sequence[GeneratedText], resources: Resources) -> list[Scored]:
        """The score of each text, in order."""
        return scorer(self.kind).score(self.settings, texts, resources)

    def value(self) -> dict[str, Any]:
        """The scorer and its settings as JSON values, for a run's record."""
        settings = {name: _json(entry) for name, entry in vars(self.settings).items()}
        return {"name": self.name, "kind": self.kind, **settings}


def available() -> dict[str, Scorer]:
    """Every scorer, built in or from outside, by name."""
    return discover_as(Scorer, "scorer", __name__, GROUP)


def kinds() -> list[str]:
    """The names of all scorers, without importing them."""
    return names(__name__, GROUP)


def scorer(kind: str) -> Scorer:
    """The scorer of that name. Raises UsageError, which suggests a similar name."""
    return choose("scorer", kind, available())


def parse(text: str, folder: Path = Path(), given: str = "--scorer") -> ConfiguredScorer:
    """The scorer for `KIND:VALUE` or `NAME=KIND:VALUE`; paths are relative to `folder`, also those of models.

    `given` is how messages name it. Raises UsageError with all problems.
    """
    match = _NAMED.fullmatch(text)
    if match is None:
        raise UsageError(f"{given} {text[:80]!r} is not [NAME=]KIND:VALUE", f"the kinds are {', '.join(kinds())}")
    kind = match["kind"]
    fields = dataclasses.fields(scorer(kind).Settings)
    entry = {"kind": kind} | ({"name": match["name"]} if match["name"] else {})
    value = {fields[0].name: match["value"]} if match["value"] else {}
    return configured({**entry, **value}, folder, f"{given} {text[:80]!r}")


def configured(entry: Mapping[str, Any], folder: Path, where: str = "scorer") -> ConfiguredScorer:
    """The scorer that a mapping with `kind` and settings describes; paths are relative to `folder`.

    Raises UsageError with all problems, each of which begins with `where`.
    """
    kind = entry.get("kind")
    if not isinstance(kind, str):
        raise UsageError(f"{where} has no kind", f"the kinds are {', '.join(kinds())}")
    module = scorer(kind)
    name = entry.get("name", kind)
    problems = [] if isinstance(name, str) and name else [f"name is {excerpt(name)}, not text"]
    hints = typing.get_type_hints(module.Settings)
    fields = {field.name: field for field in dataclasses.fields(module.Settings)}
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key in ("kind", "name"):
            continue
        if key not in fields:
            problems.append(f"{kind} has no setting {key!r}{guess(str(key), fields)}; it has {', '.join(fields)}")
            continue
        try:
            values[key] = _converted(hints[key], value, folder)
            if _is_model(fields[key]) and isinstance(value, str):
                values[key] = _model(value, folder)
        except ValueError as error:
            problems.append(f"{key} is {excerpt(value)}, not {error}")
    problems += [
        f"{kind} needs {key}"
        for key, field in fields.items()
        if key not in entry and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if not problems:
        settings = module.Settings(**values)
        problems = options.problems_of(settings)
        try:
            problems = problems or module.problems_of(settings)
        except SteerError as error:
            problems = list(error.problems)
    if problems:
        raise UsageError([f"{where}: {problem}" for problem in problems], f"{kind}: {module.SUMMARY}")
    return ConfiguredScorer(name, kind, settings)


def _converted(kind: Any, value: Any, folder: Path) -> Any:
    """A value of a suite or of the command line as the type of its setting. Raises ValueError with what is wanted."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        if value is None:
            return None
        kind = next(member for member in typing.get_args(kind) if member is not type(None))
    if kind is Path:
        if isinstance(value, str) and value:
            return folder / Path(value).expanduser()
        raise ValueError("a path")
    if kind is str:
        if isinstance(value, str):
            return value
        raise ValueError("text")
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise ValueError("true or false")
    if kind in (int, float):
        if isinstance(value, int | float) and not isinstance(value, bool) and (kind is float or value == int(value)):
            return kind(value)
        raise ValueError("a whole number" if kind is int else "a number")
    entries = [value] if isinstance(value, str) else value
    if isinstance(entries, list) and all(isinstance(entry, str) for entry in entries):
        return tuple(entries)
    raise ValueError("a list of texts")


def _is_model(field: dataclasses.Field[Any]) -> bool:
    """Whether a setting names a model: a folder or a hub id."""
    facts = field.metadata.get(options.OPTION)
    return facts is not None and facts.complete == "models"


def _model(reference: str, folder: Path) -> str:
    """A model's folder as seen from the current one, if it is a path or a folder there; else the hub id as it is."""
    path = folder / Path(reference).expanduser()
    is_path = reference.startswith(("./", "../", "~")) or reference in (".", "..") or path.is_dir()
    return str(path) if is_path and folder != Path() else reference


def _json(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


class Rate(NamedTuple):
    """The mean of the scores of several texts, with its 95 % interval; None where every score is missing.

    `missing` counts the texts without a score by reason: what they would have got is not known.
    """

    mean: float | None
    interval: tuple[float, float] | None
    scored: int
    missing: dict[str, int]


def rate(scored: Sequence[Scored], groups: Sequence[str] = (), seed: int = 0) -> Rate:
    """The rate of scores that are 0 or 1, with Wilson's interval, or else their mean, with that of the bootstrap.

    `groups` has an entry for each text, where texts share a template and so count as fewer.
    """
    present = [i for i, each in enumerate(scored) if each.value is not None]
    values = [float(scored[i].value or 0.0) for i in present]
    missing = dict(Counter(each.reason for each in scored if each.value is None))
    if not values:
        return Rate(None, None, 0, missing)
    import torch  # imported here, since the command line lists the scorers

    from probes.statistics.paired import difference
    from probes.statistics.proportions import proportion

    chosen = [groups[i] for i in present] if groups else None
    if set(values) <= {0.0, 1.0}:
        mean, low, high = proportion(torch.tensor(values), chosen)
    else:
        mean, low, high = difference(torch.tensor(values), chosen, seed=seed)[:3]
    return Rate(mean, (low, high), len(values), missing)
