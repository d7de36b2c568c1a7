"""What a bake reads: prompts, texts to train on, pairs to prefer, replay texts; and which samples are held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def prompts_of(path: Path) -> tuple[list[str], str]:
    """Prompts, one a line: a JSON string, or an object with a "prompt"; and the file's digest. Raises ExampleError."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ExampleError(f"{path} can't be read: {reason}", "check the path") from error
    found, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: invalid JSON: {error}")
            continue
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if isinstance(prompt, str) and prompt.strip():
            found.append(prompt)
        else:
            problems.append(f"{path}:{number}: no prompt")
    if not found and not problems:
        problems.append(f"{path} is empty")
    if problems:
        raise ExampleError(problems[:20], 'one prompt a line: a JSON string, or {"prompt": "..."}')
    return list(dict.fromkeys(found)), digest_bytes(content)


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


def split(count: int, digests: Sequence[str], share: float = 0.1) -> tuple[list[int], list[int]]:
    """Which of `count` samples are trained on and which held out: by their content, at least one and at most 64."""
    order = sorted(range(count), key=lambda i: digests[i])
    size = min(max(1, round(count * share)), 64, count - 1)
    held = set(order[:size])
    return [i for i in range(count) if i not in held], sorted(held)
