"""The data files of a bake: completions to imitate, and preference pairs."""

from __future__ import annotations

from pathlib import Path

from probes.data.examples import Example
from probes.data.reading import read, read_class
from vectors.errors import ExampleError
from vectors.storage.files import digest_bytes


def file_digest(path: Path) -> str:
    """The digest of a file's text, as run records name it. Raises ExampleError."""
    try:
        return digest_bytes(path.read_bytes().decode("utf-8-sig", "replace").encode())
    except OSError as error:
        raise ExampleError(f"{path} can't be read: {error.strerror}", "check the path") from error


def examples_of(path: Path, flag: str) -> tuple[list[Example], str]:
    """The examples of a file, and its digest. Raises ExampleError, also for fewer than two different examples."""
    examples, digest = read_class(path, flag)
    if len({example.content for example in examples}) < 2:
        raise ExampleError(f"{path} holds one example, so none can be held out for evaluation", "give at least two")
    return examples, digest


def pairs_of(path: Path) -> tuple[list[tuple[Example, Example]], str]:
    """Pairs of the preferred and the rejected completion of a prompt, and the file's digest. Raises ExampleError."""
    contrast = read(pairs=path)
    if not contrast.paired:
        raise ExampleError(f"{path} holds no pairs", 'write lines of the form {"prompt", "positive", "negative"}')
    pairs = list(zip(contrast.positive, contrast.negative, strict=True))
    if len(pairs) < 2:
        raise ExampleError(f"{path} holds one pair, so none can be held out for evaluation", "give at least two")
    return pairs, contrast.digests["pairs"]
