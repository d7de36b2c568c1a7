"""The API keys of a server: from a file or the environment, so that no list of processes shows them.

`steer serve` hands them to vLLM in the environment of its process, never among its arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from steer.serving.flags import taken
from vectors.errors import UsageError

KEYS = "STEER_API_KEYS"  # a JSON list, from the launcher to `steer.serving.vllm_command`
VARIABLES = ("STEER_API_KEY", "VLLM_API_KEY")  # set by the user; the first that is set counts
INSTEAD = "use --api-key-file FILE, or set STEER_API_KEY"
_FLAG, _TOKEN = "--api-key", "--hf-token"


class Keys(NamedTuple):
    """The keys that clients may send, the flags for vLLM without them, and whether they stood among the arguments."""

    keys: tuple[str, ...]
    flags: tuple[str, ...]
    visible: bool


def api_keys(flags: Sequence[str], values: Sequence[str], file: Path | None, environment: Mapping[str, str]) -> Keys:
    """The API keys: `values` of --api-key, those among vLLM's `flags`, the lines of `file`, else of the environment.

    Raises UsageError for a key that is given in two places, and for one that no client can send.
    """
    rest, among = taken(flags, _FLAG, "--api-k", several=True)
    sources = {
        "--api-key": tuple(values),
        "-- --api-key": among,
        "--api-key-file": () if file is None else _lines(file),
    }
    given = [name for name, keys in sources.items() if keys]
    if len(given) > 1:
        raise UsageError(f"the API key is given by {' and by '.join(given)}", "give it once")
    keys = next((keys for keys in sources.values() if keys), ())
    if not given:
        keys = next(((environment[name],) for name in VARIABLES if environment.get(name)), ())
    problems = [
        f"the API key number {i + 1} {problem}" for i, key in enumerate(keys) if (problem := _problem(key, keys))
    ]
    if problems:
        raise UsageError(problems, "use a key of letters, digits and signs, as `openssl rand -hex 32` makes")
    return Keys(keys, rest, given in (["--api-key"], ["-- --api-key"]))


def hub_token(flags: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """The flags for vLLM without `--hf-token TOKEN`, and the token, which `HF_TOKEN` hands over; None without one.

    `--hf-token` without a value, which stands for the token of `hf auth login`, stays.
    """
    rest, tokens = taken(flags, _TOKEN, "--hf-t")
    return (rest, tokens[-1]) if tokens else (tuple(flags), None)


def arguments_of(environment: Mapping[str, str]) -> list[str]:
    """The arguments that give vLLM the keys which the launcher put into the environment of this process."""
    keys = json.loads(environment.get(KEYS, "[]"))
    return [f"{_FLAG}={keys[0]}"] if len(keys) == 1 else [_FLAG, *keys] if keys else []


def _lines(file: Path) -> tuple[str, ...]:
    try:
        text = file.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UsageError(
            f"the API key file {file} can't be read: {reason}", "name a file with one key a line"
        ) from error
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise UsageError(f"the API key file {file} holds no key", "write one key a line")
    return keys


def _problem(key: str, keys: Sequence[str]) -> str | None:
    """Why a client could not send this key, or vLLM not take it. The key itself is never shown."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        return "is empty, or holds spaces or signs that no header can carry"
    if key.startswith("-") and len(keys) > 1:
        return "begins with -, which vLLM can't take beside other keys"
    return None
