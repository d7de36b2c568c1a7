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
        self.fresh: dict[str, dict[str, Any]] = {}  # the keys of the cells that were measured and not read
        self.measured = self.reused = 0

    def figures(self, key: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of a cell: as they were recorded, or measured now and recorded. Raises OutputError."""
        name = digest_json({"context": self.context, **key}).removeprefix("sha256:")[:32]
        if name not in self.known:
            recorded = self._read(name, key)
            if recorded is None:
                self.record(name, dict(key), measure())
            else:
                self.reused += 1
                self.known[name] = recorded
        figures: dict[str, Any] = self.known[name]
        return figures

    def record(self, name: str, key: Mapping[str, Any], figures: dict[str, Any]) -> None:
        """Record the figures of a cell that was measured here or elsewhere, once. Raises OutputError."""
        if name in self.known:
            return
        self.measured += 1
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            content = canonical_json({"key": dict(key), "figures": figures})
            write_atomically(self.folder / f"{name}.json", content.encode())
        self.known[name] = figures
        self.fresh[name] = dict(key)

    def take(self, cells: Mapping[str, tuple[dict[str, Any], dict[str, Any]]]) -> None:
        """Record what other processes measured: key and figures of each cell, by name."""
        for name, (key, figures) in cells.items():
            self.record(name, key, figures)

    def recorded(self) -> dict[str, dict[str, Any]]:
        """The figures of every cell that is recorded, by name, for other processes."""
        found = dict(self.known)
        for file in sorted(self.folder.glob("*.json")) if self.folder is not None else []:
            value = self._value(file.stem)
            if file.stem not in found and isinstance(value, dict) and isinstance(value.get("figures"), dict):
                found[file.stem] = value["figures"]
        return found

    def _read(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """A recorded cell; None where there is none, or none that can be read."""
        value = self._value(name)
        whole = isinstance(value, dict) and value.get("key") == dict(key) and isinstance(value.get("figures"), dict)
        return value["figures"] if whole else None

    def _value(self, name: str) -> Any:
        if self.folder is None:
            return None
        try:
            return json_text.parse((self.folder / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None
