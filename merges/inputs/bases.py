"""The locations of base models on this machine; task vectors record their base by digest, never by path.

`steer diff` and `steer merge` enter the paths of bases in a cache, so that `steer merge v1 v2` needs no `--base`. An
entry is checked against the digest before it is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vectors import references
from vectors.errors import SteerError
from vectors.storage.files import write_atomically


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steer" / "bases.json"


def _read_cache() -> dict[str, str]:
    try:
        paths = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {d: p for d, p in paths.items() if isinstance(p, str)} if isinstance(paths, dict) else {}


def remember(digest: str, path: Path) -> None:
    """Enter the path of the model with this digest in the cache; errors of writing the cache are ignored."""
    paths = _read_cache()
    location = str(path.resolve())
    if paths.get(digest) == location:
        return
    try:
        _cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_cache_file(), json.dumps(paths | {digest: location}).encode())
    except (OSError, SteerError):
        pass


def recall(base: Mapping[str, Any]) -> str | None:
    """A reference to the base that an artifact records: its hub id, or the cached path; None if unknown."""
    if base.get("name"):
        return f"{base['name']}@{base['revision']}" if base.get("revision") else str(base["name"])
    location = _read_cache().get(str(base.get("digest")))
    if location is None or not os.path.isdir(location):
        return None
    try:
        digest = references.identity(references.resolve(location))["digest"]
    except SteerError:
        return None
    return location if digest == base["digest"] else None
