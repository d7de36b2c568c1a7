"""Model references: an existing folder, a hub id (`org/name@revision`), or the bundled default `smollm2`."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vectors.documents import json_text
from vectors.documents.artifacts import CONFIGURATION, INDEX
from vectors.documents.schema import problems_of
from vectors.errors import ModelError, shortened
from vectors.storage import bundled
from vectors.storage.files import digest_bytes
from vectors.weights import read_header

DEFAULT = "smollm2"
SAMPLE = 4096  # bytes read of each tensor for the fingerprint
FETCHED = [
    "*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken", "*.bpe", "*.spm", "*.py", "*.yaml", "*.yml",
    "LICENSE*", "NOTICE*", "README.md",
]  # fmt: skip
NOT_FETCHED = [
    "consolidated*", "*/*.safetensors", "*/*.index.json", "original/*", "onnx/*", "openvino/*", "coreml/*", "gguf/*",
    "checkpoint-*/*", "runs/*", "logs/*", ".*/*",
]  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OTHERS = {"*.gguf": "GGUF", "*.h5": "TensorFlow", "*.msgpack": "Flax", "*.onnx": "ONNX", "*.npz": "NumPy"}
VOLATILE = ("_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype")


class ModelSource(NamedTuple):
    """A resolved model reference: the folder, and for a hub model its id and commit (for `smollm2`, its name)."""

    path: Path
    name: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        name = f"{self.name}@{self.revision}" if self.revision else self.name
        return f"{name} ({self.path})" if name else str(self.path)


def resolve(reference: str) -> ModelSource:
    """The folder of a model; files that are not in the cache are downloaded. Raises ModelError."""
    # os.path answers False where pathlib raises: for a name that is too long, or an unknown ~user.
    path = Path(os.path.expanduser(reference))
    if reference and os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise ModelError(
                f"the folder {reference} has no config.json, so it is not a model",
                "name a folder that save_pretrained wrote",
            )
        if path.resolve() == bundled.folder().resolve():
            return ModelSource(path, DEFAULT)
        return ModelSource(path)
    if os.path.isfile(path):
        raise ModelError(f"{reference} is a file, not a model folder", "name the folder that holds config.json")
    if reference == DEFAULT:
        return ModelSource(bundled.prepare(), DEFAULT)
    name, _, revision = reference.partition("@")
    if not _is_hub_id(reference):
        raise ModelError(
            f"there is no model {reference!r}: it is neither a folder nor a hub id",
            f"use a folder, an id like org/name@revision, or {DEFAULT}",
        )
    return _from_hub(name, revision or None)


def at_hand(reference: str) -> bool:
    """Whether a reference is resolved, or refused, at once: without a download, or converting the bundled model."""
    if os.path.exists(os.path.expanduser(reference)):
        return True
    return bundled.folder().is_dir() if reference == DEFAULT else not _is_hub_id(reference)


def _is_hub_id(reference: str) -> bool:
    name = reference.partition("@")[0]
    return name.count("/") == 1 and not reference.startswith((".", "/", "~")) and not name.endswith("/")


def _from_hub(name: str, revision: str | None) -> ModelSource:
    """The snapshot of a hub model: from the cache if complete, otherwise downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    reference = f"{name}@{revision}" if revision else name
    # Some repositories hold the weights twice: also as a consolidated file, or in folders (original, onnx). Other
    # folders hold settings, such as 1_Pooling and additional_chat_templates.
    choice = {"allow_patterns": FETCHED, "ignore_patterns": NOT_FETCHED}
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True, **choice))
        if not _complete(folder):
            raise LocalEntryNotFoundError(f"{folder} is incomplete")
    except (LocalEntryNotFoundError, ValueError):
        try:
            folder = Path(snapshot_download(name, revision=revision, **choice))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(
                f"the model {reference} is not in the cache and can't be fetched: {reason}",
                f"check the id and the network, or use a folder, or {DEFAULT}",
            ) from error
        # Offline, the hub's client returns what is cached, complete or not.
        if not _complete(folder):
            raise ModelError(
                f"the model {reference} is incomplete: config.json, safetensors or a tokenizer are missing in {folder}",
                f"check the network, so that the missing files can be downloaded, or use a folder, or {DEFAULT}",
            ) from None
    return ModelSource(folder, name, folder.name)


def _complete(folder: Path) -> bool:
    """Whether a snapshot has a configuration, a tokenizer, and every weight file that its index names."""
    tokenizer = ("tokenizer.json", "*.model", "vocab.*")
    if not (folder / "config.json").exists() or not any(any(folder.glob(name)) for name in tokenizer):
        return False
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            return all((folder / name).exists() for name in set(weight_map(index).values()))
        except ModelError:
            return False
    return any(not path.name.startswith("consolidated") for path in folder.glob("*.safetensors"))


def cached() -> list[ModelSource]:
    """The hub models in the local cache that can be used offline, by name."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    sources = [
        ModelSource(revision.snapshot_path, repository.repo_id, revision.commit_hash)
        for repository in repositories
        if repository.repo_type == "model"
        for revision in repository.revisions
        if _complete(revision.snapshot_path)
    ]
    return sorted(sources, key=str)


def identity(source: ModelSource) -> dict[str, Any]:
    """The identity of a model, as vectors record it for their base.

    The keys are `digest`, `architecture`, `hidden_size`, `layers` (their number), and `name` and `revision` where
    known. The digest covers the configuration and, for every tensor, its name, dtype, shape and 4 KiB from its middle:
    it tells a fine-tuned model from its base, does not depend on the sharding, and takes a second for a 70B model.
    Raises ModelError for a damaged folder.
    """
    file = source.path / "config.json"
    config = json_text.read(file, ModelError, "fetch the model again")
    if problems := problems_of(config, CONFIGURATION):
        raise ModelError([f"{file} is damaged: {problem}" for problem in problems], "fetch the model again")
    config = _lasting(config)
    text = config.get("text_config") or config
    # Not canonical_json: configurations may hold Infinity, such as the `time_step_limit` of Mamba.
    state = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    for name, description in sorted(_tensors(source.path).items()):
        state.update(f"{name} {description}".encode())
    architectures = config.get("architectures") or [config.get("model_type", "unknown")]
    fields = {
        "digest": "sha256:" + state.hexdigest(),
        "architecture": architectures[0],
        "hidden_size": text.get("hidden_size") or text.get("n_embd"),
        "layers": text.get("num_hidden_layers")
        or text.get("n_layer")
        or len(text.get("layers_block_type") or ())
        or None,
    }
    optional = {"name": source.name, "revision": source.revision}
    return fields | {key: value for key, value in optional.items() if value}


def _lasting(value: Any) -> Any:
    """A configuration without the keys that differ between copies of one model."""
    if isinstance(value, dict):
        return {key: _lasting(inner) for key, inner in value.items() if key not in VOLATILE}
    return [_lasting(inner) for inner in value] if isinstance(value, list) else value


def identified(source: ModelSource, identity: Mapping[str, Any]) -> dict[str, Any]:
    """A model's identity for messages: a folder without a name is called by its path, not by the digest alone."""
    return {"name": str(source), **identity}


def licence(source: ModelSource) -> str | None:
    """The licence of a model: `license` in the front matter of its model card; None if it is not stated."""
    if source.name == DEFAULT:
        return "apache-2.0"
    card = source.path / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return None
    front = itertools.takewhile(lambda line: line.rstrip() != "---", lines[1:])
    stated = [line.partition(":")[2].strip().strip("'\"") for line in front if line.startswith("license:")]
    return (stated[0] or None) if stated else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's weights, without vectors or adapters in the same folder. Raises ModelError."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    return sorted(folder / name for name in set(weight_map(index).values()))


def without_safetensors(reference: str, folder: Path) -> ModelError:
    """The error for a model folder without safetensors: what its weights are instead, and how to convert them."""
    files = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
    pickled = sorted(name for name in files if name != "training_args.bin")
    if pickled:
        return ModelError(
            f"{reference} has its weights in {shortened(pickled)}, which are pickles and may run code when they are "
            "opened, and none as safetensors",
            "use a revision with safetensors, or convert it where nothing is at stake: "
            f"AutoModelForCausalLM.from_pretrained('{reference}', weights_only=True).save_pretrained('NEW')",
        )
    for pattern, name in _OTHERS.items():
        if any(folder.glob(pattern)):
            return ModelError(
                f"{reference} has its weights as {name}, not as safetensors", "use the model that they were made of"
            )
    return ModelError(f"{reference} has no safetensors weights", "save the model as safetensors")


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor by name, from the index of a model in several files. Raises ModelError."""
    value = json_text.read(index, ModelError, "fetch the model again")
    if problems := problems_of(value, INDEX):
        raise ModelError(
            [f"{index} is damaged: {problem}" for problem in problems], "fetch the model again, from someone you trust"
        )
    names: dict[str, str] = value["weight_map"]
    return names


def _tensors(folder: Path) -> dict[str, str]:
    """The dtype, shape and digest of a sample of the bytes, as one text, for each tensor of a model folder."""
    descriptions: dict[str, str] = {}
    for path in weight_files(folder):
        try:
            entries = read_header(path)[0]
        except ModelError as error:
            raise ModelError(error.problems, "fetch the model again") from error
        try:
            with path.open("rb") as file:
                for name, entry in entries.items():
                    file.seek(entry.start + max(0, (entry.size - SAMPLE) // 2))
                    sample = file.read(min(SAMPLE, entry.size))
                    descriptions[name] = f"{entry.dtype} {list(entry.shape)} {digest_bytes(sample)}"
        except OSError as error:
            raise ModelError(f"{path} can't be read: {error.strerror or error}", "fetch the model again") from error
    return descriptions
