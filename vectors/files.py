"""Bytes on disk: canonical JSON, digests, and writes that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vectors.errors import OutputError


def canonical_json(value: Any) -> str:
    """The one text of a JSON value: sorted keys, no spaces, UTF-8, no NaN or infinity (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_bytes(*parts: bytes | memoryview) -> str:
    """`sha256:` and the hexadecimal SHA-256 of the parts, one after the other."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return "sha256:" + state.hexdigest()


def digest_file(path: Path) -> str:
    """The digest of a file's bytes."""
    return digest_bytes(path.read_bytes())


def digest_json(value: Any) -> str:
    """The digest of a value's canonical JSON."""
    return digest_bytes(canonical_json(value).encode())


def permissions(requested: int = 0o666) -> int:
    """`requested` less the umask: without it, the mode that a plain `open(..., "w")` gives a new file."""
    # The umask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return requested & ~mask


def _written(path: Path) -> Path:
    """The file that writing to `path` makes: links are followed, as by any program that writes, not replaced."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def check_writable(path: Path) -> None:
    """Fail before any work when `path` can't become a file. Raises OutputError.

    Only an ordinary file that allows writing may be replaced; renaming would replace anything else just as well.
    """
    target = _written(path)
    folder = target.parent
    # os.path answers False where pathlib raises: for a name that is too long, or a folder that can't be entered.
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder", "name a file, such as " + str(path / "vector.safetensors"))
    if os.path.islink(target):
        raise OutputError(f"{path} is a link that leads back to itself", "choose another --out")
    if os.path.exists(target):
        mode = os.stat(target).st_mode
        if not stat.S_ISREG(mode):
            raise OutputError(f"{path} is a pipe, socket or device, not an ordinary file", "choose another --out")
        # The mode as well, since to the superuser every file is writable.
        if not mode & 0o222 or not os.access(target, os.W_OK):
            raise OutputError(f"{path} is read-only", f"allow it: chmod u+w {path}; or choose another --out")
    if not os.path.exists(folder):
        raise OutputError(
            f"the folder {folder} of the output {path.name} does not exist", f"make it first: mkdir -p {folder}"
        )
    try:
        # Asking the file system, not the mode bits: read-only mounts and quotas answer here too.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror}", "choose another --out") from error


def check_distinct(out: Path, inputs: Mapping[str, object]) -> None:
    """Refuse an output that is one of the inputs, by option or argument. Raises OutputError."""
    for name, source in inputs.items():
        there = isinstance(source, str | Path) and os.path.exists(out) and os.path.exists(source)
        if there and os.path.samefile(out, str(source)):
            raise OutputError(f"the output {out} is the file given as {name}", "name another file to write")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name beside `path`, flush it to disk, and rename it.

    A kill or a full disk at any moment leaves the old file or none, never a part. A link stays, and what it leads to is
    written. Raises OutputError.
    """
    temporary: Path | None = None
    target = _written(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, permissions())
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        hint = "free some space, or choose another --out" if error.errno == 28 else "choose another --out"
        raise OutputError(f"{path} can't be written: {error.strerror}", hint) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
