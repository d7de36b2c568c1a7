"""What a bake reads: prompts, texts to train on, pairs to prefer, general texts; and how they become tokens."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from probes.data.examples import Example
from probes.data.reading import read, read_class
from vectors.errors import ExampleError, UsageError
from vectors.files import digest_bytes

SHARE = 0.25  # of general data among all


class Mix(NamedTuple):
    """General data: a file, or None for the model's own continuations; and its share of all samples."""

    path: Path | None
    share: float


def parse_mix(text: str | None) -> Mix:
    """`FILE:0.25`, `FILE`, `0.25` or `0`. Raises UsageError."""
    if text is None:
        return Mix(None, SHARE)
    name, colon, number = text.rpartition(":")
    if not colon:
        name, number = ("", text) if _is_number(text) else (text, str(SHARE))
    if not _is_number(number) or not 0 <= float(number) < 1:
        raise UsageError(f"--mix {text!r} has no share in [0, 1)", "write --mix general.jsonl:0.25")
    return Mix(Path(name) if name else None, float(number))


def file_digest(path: Path) -> str:
    """The digest of a file as reports name it. Raises ExampleError."""
    try:
        return digest_bytes(path.read_bytes().decode("utf-8-sig", "replace").encode())
    except OSError as error:
        raise ExampleError(f"{path} can't be read: {error.strerror}", "check the path") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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
