"""Where a judge is reached: its URL, its model, and its API key, which no argument, record or message ever shows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vectors.documents import yaml_text
from vectors.documents.json_text import read_bounded
from vectors.documents.schema import Check, number, one_of, optional, problems_of, record, text, whole
from vectors.errors import SteerError, UsageError, collecting, guess, raise_together

KEY = "STEER_JUDGE_KEY"  # the variable with the API key, for judges that need one
HINT = "write `url`, `model`, and where the judge needs a key `key_file: FILE`, or set STEER_JUDGE_KEY"
LARGEST = 65_536  # bytes of a judge's file or a key file


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A judge: an OpenAI-compatible server (`url` ends before `/chat/completions`) and a model there.

    temperature   0 for the likeliest answer; None leaves it to the server, for models that refuse one
    max_tokens    longest answer; reasoning counts
    token_field   the request's field for it; some models take only `max_completion_tokens`
    timeout       seconds that one request may take
    attempts      tries of one request before its answer is missing
    backoff       seconds before the second try; each further wait is twice as long, up to 30
    concurrency   requests under way at once
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    temperature: float | None = 0.0
    max_tokens: int = 512
    token_field: str = "max_tokens"
    timeout: float = 120.0
    attempts: int = 5
    backoff: float = 0.5
    concurrency: int = 8

    def value(self) -> dict[str, Any]:
        """What a run's record holds of it: everything that an answer may depend on, without the key."""
        names = ("url", "model", "temperature", "max_tokens")
        return {name: getattr(self, name) for name in names}


def _positive(value: Any, name: str) -> Any:
    problems = list(number(value, name))
    yield from problems
    if not problems and value <= 0:
        yield f"{name} is {value:g}, not a number above 0"


_FIELDS: dict[str, Check] = {
    "url": text(r"\S+", "a URL", longest=2000),
    "model": text(r"[\s\S]+", "the name of a model", longest=1000),
    "key_file": text(r"[\s\S]+", "a path", longest=4000),
    "temperature": optional(number),
    "max_tokens": whole(1, 1_000_000),
    "token_field": one_of("max_tokens", "max_completion_tokens"),
    "timeout": _positive,
    "attempts": whole(1, 20),
    "backoff": _positive,
    "concurrency": whole(1, 256),
}
_JUDGE = record({name: _FIELDS[name] for name in ("url", "model")}, _FIELDS)


def endpoint(
    judge: str, *, model: str | None = None, key_file: Path | None = None, environment: Mapping[str, str] | None = None
) -> Endpoint:
    """The endpoint that `--judge` names: a URL (then `model` is needed too), or a YAML file with these fields.

    The key comes from `key_file`, else from the file's own `key_file` (relative to it), else from STEER_JUDGE_KEY in
    `environment`, by default the process's. Raises UsageError with all problems.
    """
    values: dict[str, Any] = {"url": judge}
    folder = Path()
    if not judge.startswith(("http://", "https://")):
        values, folder = _read(Path(judge)), Path(judge).parent
    if model is not None:
        values["model"] = model
    problems = problems_of(values, _JUDGE, "judge")
    problems += [f"judge has no {name!r}{guess(str(name), _FIELDS)}" for name in values if name not in _FIELDS]
    if isinstance(values.get("url"), str):
        problems += problems_of_url(values["url"])
    errors: list[SteerError] = [UsageError(problems, HINT)] if problems else []
    key = ""
    with collecting(errors):
        file = values.pop("key_file", None)
        given = key_file or (folder / Path(file).expanduser() if isinstance(file, str) else None)
        key = read_key(given) if given else (os.environ if environment is None else environment).get(KEY, "").strip()
        require_sendable(key, str(given or KEY))
    raise_together(errors)
    return Endpoint(**{**values, "url": values["url"].rstrip("/")}, key=key)


def require_sendable(key: str, source: str) -> None:
    """Raise UsageError for a key that no header can carry, without showing it; `source` is where it was read."""
    if not key.isascii() or (key and not key.isprintable()) or " " in key:
        raise UsageError("the judge's API key holds signs that no header can carry", f"check {source}")


def problems_of_url(url: str) -> list[str]:
    """Why a judge can't be reached at a URL. A password in it would stand in records and lists of processes."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        return [f"the judge's URL is not valid: {error}"]
    problems = []
    if parts.scheme not in ("http", "https") or not host:
        problems.append(f"the judge's URL is {url[:200]!r}, not http://HOST/v1 or https://HOST/v1")
    if parts.username or parts.password:
        problems.append(f"the judge's URL for {host} holds a user name or a password, which would be recorded")
    if parts.query or parts.fragment:
        problems.append("the judge's URL has a query or a fragment, where a path must end")
    if parts.path.rstrip("/").endswith("/chat/completions"):
        problems.append("the judge's URL ends in /chat/completions, which is added to it: leave that out")
    return problems


def read_key(file: Path) -> str:
    """The key in a file, alone on its first line. Raises UsageError."""
    try:
        lines = read_bounded(file.expanduser(), LARGEST).decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"the judge's key file {file} can't be read: {reason}", "write the key into it") from error
    if not lines[0].strip() or any(line.strip() for line in lines[1:]):
        raise UsageError(f"the judge's key file {file} does not hold one line", "write the key alone into it")
    return lines[0].strip()


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml_text.parse(read_bounded(file, LARGEST).decode("utf-8-sig"), texts=("model", "url", "key_file"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"the judge {file} can't be read: {reason}", "give a URL, or a YAML file") from error
    if not isinstance(values, dict):
        raise UsageError(f"the judge {file} is not a mapping", HINT)
    return values
