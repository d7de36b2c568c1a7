"""The cells of a sweep: what was measured of one candidate at one strength, recorded as soon as it is known.

Each is a small file that appears whole or not at all, under the digest of everything that its figures depend on. A
sweep that was killed at any point and is started again measures only what is missing, and ends with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vectors.documents import json_text
from vectors.storage.files import canonical_json, digest_json, write_atomically

FOLDER = "cells"


class Cells:
    """The cells of a folder; without one they live in memory. A class because cells are found again across calls."""

    def __init__(self, folder: Path | None, context: Mapping[str, Any]) -> None:
        """`context` is what all cells depend on: the model, the texts, the settings."""
        self.context = digest_json(dict(context))
        self.folder = None if folder is None else folder / FOLDER
        self.known: dict[str, Any] = {}
        self.measured = self.reused = 0

    def figures(self, key: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of a cell: as they were recorded, or measured now and recorded. Raises OutputError."""
        name = digest_json({"context": self.context, **key}).removeprefix("sha256:")[:32]
        if name not in self.known:
            recorded = self._read(name, key)
            if recorded is None:
                recorded = measure()
                self.measured += 1
                if self.folder is not None:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    content = canonical_json({"key": dict(key), "figures": recorded})
                    write_atomically(self.folder / f"{name}.json", content.encode())
            else:
                self.reused += 1
            self.known[name] = recorded
        figures: dict[str, Any] = self.known[name]
        return figures

    def _read(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """A recorded cell; None where there is none, or none that can be read."""
        if self.folder is None:
            return None
        try:
            value = json_text.parse((self.folder / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None
        whole = isinstance(value, dict) and value.get("key") == dict(key) and isinstance(value.get("figures"), dict)
        return value["figures"] if whole else None
