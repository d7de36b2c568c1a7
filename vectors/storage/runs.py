"""The record of a run: its configuration, inputs, environment, metrics and outputs.

Every command that writes an output also writes one: `run.json` in an output folder, `NAME.run.json` beside an output
file. It holds no time, no path of the machine and no user name, so that a repeated run writes the same record.
"""

from __future__ import annotations

import os.path
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vectors.documents import json_text
from vectors.documents.schema import Check, anything, either, list_of, mapping_of, one_of, text
from vectors.documents.schema import problems_of as problems_of_value
from vectors.documents.schema import record as schema_of
from vectors.errors import ArtifactError
from vectors.storage.files import readable_json, write_atomically

SCHEMA = 1
RECORD = "run.json"
FORMER = ("steer_merge.json", "report.json")  # names used by earlier versions, which can still be read


@dataclass(frozen=True)
class RunRecord:
    """One run of one command, as JSON values. Every command uses the same keys.

    `config` is the request, with the defaults filled in. `inputs` are models, vectors and data by name or in order,
    each with its digests. `environment` holds the versions that the result may depend on. `metrics` holds all
    measurements; those over time are the list `metrics["history"]`. `outputs` are the digests of the written files by
    name. `details` holds entries specific to the command, such as the shards of a merge.
    """

    command: str
    mode: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] | Sequence[Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def value(self) -> dict[str, Any]:
        """The record as JSON values, as it is written to the file."""
        return {
            "schema": SCHEMA,
            "command": self.command,
            "mode": self.mode,
            "config": dict(self.config),
            "inputs": self.inputs if isinstance(self.inputs, Sequence) else dict(self.inputs),
            "environment": dict(self.environment),
            "metrics": dict(self.metrics),
            "outputs": dict(self.outputs),
            "details": dict(self.details),
        }

    def write(self, output: Path) -> Path:
        """Write the record in an output folder or beside an output file; returns its path. Raises OutputError."""
        path = record_path(output)
        write_atomically(path, readable_json(self.value()))
        return path

    @staticmethod
    def of(value: Mapping[str, Any]) -> RunRecord:
        """The record for JSON values. Raises ValueError with all problems."""
        problems = problems_of(value)
        if problems:
            raise ValueError("; ".join(problems))
        return RunRecord(**{key: value[key] for key in _FIELDS if key in value})


# The section of the record for each entry of a bake's report; entries not listed go into `details`.
_SECTIONS = {
    "config": ("behaviour", "as", "settings", "extra", "composition", "via", "weights"),
    "inputs": ("base", "vectors", "inputs"),
    "metrics": (
        "models", "dose", "retention", "retention_without_mix", "steps", "history", "learning_rates", "staleness",
        "proof",
    ),
}  # fmt: skip


# Report entries whose names in the record differ.
_NAMES = {"inputs": "files"}


def record_of(command: str, report: Mapping[str, Any], *packages: str) -> RunRecord:
    """The record for a report, which is a flat mapping; `packages` are those that the results may depend on."""
    sections = {
        name: {_NAMES.get(key, key): report[key] for key in keys if key in report} for name, keys in _SECTIONS.items()
    }
    assigned = {"schema", "mode", "outputs", *(key for keys in _SECTIONS.values() for key in keys)}
    details = {key: value for key, value in report.items() if key not in assigned}
    return RunRecord(
        command, report["mode"], **sections, outputs=report["outputs"], details=details,
        environment=environment(*packages),
    )  # fmt: skip


def report_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """The flat report again, from the JSON value of its record; earlier versions wrote the flat report itself."""
    if "command" not in value:
        return dict(value)
    sections = [value.get(name, {}) for name in (*_SECTIONS, "details")]
    # Records of earlier versions have the keys of the report.
    keys: dict[str, str] = {name: key for key, name in _NAMES.items()}
    dictionaries = [section for section in sections if isinstance(section, dict)]
    report: dict[str, Any] = {
        str(keys.get(name, name)): entry for section in dictionaries for name, entry in section.items()
    }
    return report | {name: value[name] for name in ("schema", "mode", "outputs") if name in value}


_OBJECT = mapping_of(anything)
_OUTPUTS = mapping_of(
    text(longest=1000), key=text(r"(?!/)(?!(.*/)?\.\.?(/|$))[^\0]+", "a path in the folder", longest=1000)
)
_FIELDS: dict[str, Check] = {
    "command": text(longest=1000),
    "mode": text(longest=1000),
    "config": _OBJECT,
    "inputs": either(_OBJECT, list_of(anything), wanted="an object or a list"),
    "environment": _OBJECT,
    "metrics": _OBJECT,
    "outputs": _OUTPUTS,
    "details": _OBJECT,
}
_RECORD = schema_of({"schema": one_of(SCHEMA), "command": _FIELDS["command"]}, _FIELDS)
# Earlier versions wrote a flat mapping without a command, whose other fields are checked where they are read.
_FORMER_RECORD = schema_of({}, {"mode": _FIELDS["mode"], "outputs": _OUTPUTS})


def problems_of(value: Any) -> list[str]:
    """Why a JSON value is not a record of this schema; empty if it is one."""
    return problems_of_value(value, _RECORD, "" if isinstance(value, dict) else "the record")


def record_path(output: Path) -> Path:
    """The path of an output's record: in the folder, or beside the file."""
    return output / RECORD if os.path.isdir(output) else output.with_name(f"{output.stem}.{RECORD}")


def has_record(output: Path) -> bool:
    """Whether an output has a record, of this version or an earlier one."""
    return _existing_path(output) is not None


def _existing_path(output: Path) -> Path | None:
    former = [output / name if os.path.isdir(output) else output.with_name(f"{output.stem}.{name}") for name in FORMER]
    return next((path for path in (record_path(output), *former) if os.path.isfile(path)), None)


def read_json(output: Path) -> tuple[Path, dict[str, Any]]:
    """The path and the JSON value of an output's record, of this version or an earlier one.

    Records of earlier versions have other keys and no `command`. Raises ArtifactError.
    """
    path = _existing_path(output) or record_path(output)
    if not os.path.isfile(path):
        raise ArtifactError(f"{path} can't be read: No such file or directory", "name an output that `steer` wrote")
    value = json_text.read(path, ArtifactError, "make the output again")
    schema = _RECORD if isinstance(value, dict) and "command" in value else _FORMER_RECORD
    if problems := problems_of_value(value, schema):
        raise ArtifactError([f"{path} is damaged: {problem}" for problem in problems], "make the output again")
    return path, value


def environment(*packages: str) -> dict[str, str]:
    """The versions of Python and of packages, for a record; packages that are not installed are left out."""
    import importlib.metadata

    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
