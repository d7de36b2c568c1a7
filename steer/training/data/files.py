"""What a bake learns from: texts to imitate, and pairs to prefer."""

from __future__ import annotations

from pathlib import Path

from probes.data.examples import Example
from probes.data.reading import read, read_class
from vectors.errors import ExampleError
from vectors.files import digest_bytes


def file_digest(path: Path) -> str:
    """The digest of a file as reports name it. Raises ExampleError."""
    try:
        return digest_bytes(path.read_bytes().decode("utf-8-sig", "replace").encode())
    except OSError as error:
        raise ExampleError(f"{path} can't be read: {error.strerror}", "check the path") from error


def examples_of(path: Path, flag: str) -> tuple[list[Example], str]:
    """Texts to learn from, and the file's digest. Raises ExampleError, also for a single one."""
    examples, digest = read_class(path, flag)
    if len({example.content for example in examples}) < 2:
        raise ExampleError(f"{path} holds one example, and nothing can be held out of it", "give at least two")
    return examples, digest


def pairs_of(path: Path) -> tuple[list[tuple[Example, Example]], str]:
    """Pairs of the preferred and the other completion of one prompt. Raises ExampleError."""
    contrast = read(pairs=path)
    if not contrast.paired:
        raise ExampleError(f"{path} holds no pairs", 'a line is {"prompt", "positive", "negative"}')
    found = list(zip(contrast.positive, contrast.negative, strict=True))
    if len(found) < 2:
        raise ExampleError(f"{path} holds one pair, and nothing can be held out of it", "give at least two")
    return found, contrast.digests["pairs"]
