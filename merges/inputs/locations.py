"""What a reference stands for: a file, a folder, a model or an adapter of the hub, or MODEL+ADAPTER."""

from __future__ import annotations

import os.path
import re
from pathlib import Path

from merges.inputs.adapters import folder as adapters
from vectors import references

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+(@[\w./-]+)?")
_ADAPTER_FILES = [adapters.CONFIG, adapters.WEIGHTS, "README.md"]


def path_of(reference: str) -> Path:
    """A reference read as a path, with `~` expanded; whether it exists is not checked."""
    return Path(os.path.expanduser(reference))


def adapter(reference: str) -> Path | None:
    """The folder of an adapter, local or by its hub id (from the cache, or fetched); None if it is no adapter."""
    path = path_of(reference)
    if os.path.isdir(path):
        return path if adapters.is_adapter(path) else None
    if os.path.exists(path) or not _HUB_ID.fullmatch(reference):
        return None
    return _from_hub(*reference.partition("@")[::2])


def model_and_adapter(reference: str) -> tuple[str, str] | None:
    """The two references in MODEL+ADAPTER; None for one reference. A `+` in the name of a folder stays in it."""
    if "+" not in reference or os.path.exists(path_of(reference)):
        return None
    positions = [match.start() for match in re.finditer(r"\+", reference)]
    pairs = [(reference[:at], reference[at + 1 :]) for at in positions if 0 < at < len(reference) - 1]
    # Where several splits are possible, the one with most parts that exist, and of these the last.
    return max(pairs, key=lambda pair: (_exists(pair[0]) + _exists(pair[1]), len(pair[0]))) if pairs else None


def _exists(reference: str) -> int:
    if os.path.isdir(path_of(reference)) or reference == references.DEFAULT:
        return 2
    return 1 if _HUB_ID.fullmatch(reference) else 0


def _from_hub(name: str, revision: str) -> Path | None:
    """The snapshot of a hub adapter. A repository that is cached as a model is not looked up again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def snapshot(patterns: list[str], *, local: bool) -> Path:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns, local_files_only=local))

    try:
        folder = snapshot(_ADAPTER_FILES, local=True)
        if adapters.is_adapter(folder) and (folder / adapters.WEIGHTS).exists():
            return folder
        if (folder / "config.json").exists():
            return None
    except (LocalEntryNotFoundError, ValueError):
        pass
    try:
        folder = snapshot([adapters.CONFIG], local=False)
        return snapshot(_ADAPTER_FILES, local=False) if adapters.is_adapter(folder) else None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        return None  # resolving it as a model says what is wrong
