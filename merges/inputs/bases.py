"""Where the bases of task vectors lie on this machine: an artifact names its base by digest, never by a path.

What `steer diff` has seen is remembered in the cache, so that `steer merge v1 v2` needs no `--base`. A memory only:
whatever it finds is checked against the digest before it is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vectors import references
from vectors.errors import SteerError
from vectors.files import write_atomically


def _memory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steer" / "bases.json"


def _known() -> dict[str, str]:
    try:
        found = json.loads(_memory().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remember(digest: str, path: Path) -> None:
    """Note where the model of that digest lies. A cache that can't be written is no error."""
    known = _known()
    place = str(path.resolve())
    if known.get(digest) == place:
        return
    try:
        _memory().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_memory(), json.dumps(known | {digest: place}).encode())
    except (OSError, SteerError):
        pass


def recall(base: Mapping[str, Any]) -> str | None:
    """A reference to what an artifact calls its base: its name, or where it was last seen; None if unknown."""
    if base.get("name"):
        return f"{base['name']}@{base['revision']}" if base.get("revision") else str(base["name"])
    place = _known().get(str(base.get("digest")))
    if place is None or not os.path.isdir(place):
        return None
    try:
        found = references.identity(references.resolve(place))["digest"]
    except SteerError:
        return None
    return place if found == base["digest"] else None
