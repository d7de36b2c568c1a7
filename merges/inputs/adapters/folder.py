"""An adapter's folder: checked by its settings and headers, and read as deltas and changed weights of its base."""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Any, NamedTuple

from merges.engine.floats import MERGEABLE
from merges.engine.readers import Reader
from merges.inputs.adapters import changes, keys
from merges.inputs.adapters.base import Base
from merges.inputs.adapters.settings import MERGE_FIRST, Settings, problems_of_settings
from merges.inputs.checkpoints import is_pointer
from vectors.documents.json_text import read_object
from vectors.errors import ArtifactError, SteerError
from vectors.weights import Entry, read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"


class Adapter(NamedTuple):
    """The changes of an adapter by parameter: deltas that are added, and weights that replace the base's."""

    deltas: dict[str, Reader]
    weights: dict[str, Reader]
    base_name: str | None
    files: tuple[Path, ...]


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter: it has adapter_config.json, which training also leaves beside a whole model."""
    if not os.path.isfile(folder / CONFIG):
        return False
    whole = os.path.isfile(folder / "config.json") and any(folder.glob("model*.safetensors"))
    return os.path.isfile(folder / WEIGHTS) or os.path.isfile(folder / PICKLED) or not whole


def base_name(folder: Path) -> str | None:
    """The model that adapter_config.json names as its base. Raises ArtifactError for a damaged file."""
    return Settings("", _configuration(folder)).base_name


def read(folder: Path, base: Base) -> Adapter:
    """Read an adapter for its base, from headers alone. Raises ArtifactError with all problems."""
    values = _configuration(folder)
    refused = problems_of_settings(values)
    if refused:
        raise ArtifactError([f"the adapter {folder} {problem}" for problem in refused], MERGE_FIRST)
    settings = Settings(values.get("peft_type", "LORA"), values)
    entries = _entries(folder)
    problems = [
        f"holds {key} as {entry.dtype}, not floating-point"
        for key, entry in entries.items()
        if entry.dtype not in MERGEABLE
    ]
    contents = keys.sorted_out({key: entry for key, entry in entries.items() if entry.dtype in MERGEABLE})
    changed = changes.of(contents, settings, base)
    problems += contents.problems + changed.problems
    if not problems and not changed.deltas and not changed.weights:
        problems.append("changes nothing")
    if problems:
        hint = changed.hint or "use an adapter that PEFT saved for this base, or name its base: --base MODEL"
        raise ArtifactError([f"the adapter {folder} {problem}" for problem in problems], hint)
    return Adapter(changed.deltas, changed.weights, settings.base_name, (folder / WEIGHTS, folder / CONFIG))


def _configuration(folder: Path) -> dict[str, Any]:
    return read_object(folder / CONFIG, ArtifactError, "save the adapter again, or fetch it again")


def _entries(folder: Path) -> dict[str, Entry]:
    if not os.path.isfile(folder / WEIGHTS):
        if os.path.isfile(folder / PICKLED):
            raise ArtifactError(
                f"the adapter {folder} has {PICKLED}, a pickle, which may run code when it is opened, and no {WEIGHTS}",
                "convert it where you trust it: PeftModel.from_pretrained(model, FOLDER).save_pretrained(NEW)",
            )
        raise ArtifactError(f"the adapter {folder} has no {WEIGHTS}", "save the adapter as safetensors")
    if is_pointer(folder / WEIGHTS):
        raise ArtifactError(
            f"{WEIGHTS} of the adapter {folder} is a pointer of Git LFS, not weights",
            f"fetch the weights: git -C {folder} lfs pull",
        )
    try:
        return read_header(folder / WEIGHTS)[0]
    except SteerError as error:
        raise ArtifactError(error.problems, error.hint) from error
