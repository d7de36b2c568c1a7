"""The evaluations of a vector's file, which NAME.evaluations.json beside it lists: the way from it to its reports."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from vectors.documents import json_text
from vectors.errors import ArtifactError
from vectors.storage.files import canonical_json, write_atomically

SUFFIX = "evaluations.json"


def references_of(file: Path) -> list[dict[str, Any]]:
    """The evaluations that are recorded beside a vector's file, for any of its versions. Raises ArtifactError.

    Each has `vector`, the digest of the vector that was evaluated, `report`, the digest of report.json, the `folder` of
    the report as --out named it, `expression`, `outcome`, `suite` (digests by name), and by this release `sentence`.
    """
    path = path_of(file)
    if not path.is_file():
        return []
    value = json_text.read(path, ArtifactError, "remove it, and evaluate again")
    listed = value.get("evaluations") if isinstance(value, dict) else None
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise ArtifactError(f"{path} is no list of evaluations", "remove it, and evaluate again")
    return listed


def bound_to(file: Path, digests: Collection[str]) -> tuple[list[dict[str, Any]], int]:
    """The evaluations of a vector of one of these digests, and how many others are of other content that the file had.

    Raises ArtifactError.
    """
    listed = references_of(file)
    bound = [each for each in listed if each.get("vector") in digests]
    return bound, len(listed) - len(bound)


def path_of(file: Path) -> Path:
    """The list of evaluations of a vector's file."""
    return file.with_name(f"{file.stem}.{SUFFIX}")


def add(file: Path, entry: dict[str, Any]) -> None:
    """Add an evaluation to the list, in the place of one with the same report. Raises ArtifactError, OutputError."""
    listed = [each for each in references_of(file) if each.get("report") != entry["report"]]
    write_atomically(path_of(file), (canonical_json({"evaluations": [*listed, entry]}) + "\n").encode())
