"""Texts and contexts that a command reads: typed, from a file, or those of the evaluation set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from probes.data.examples import Example
from probes.data.prompts import OPENINGS, PROMPTS
from probes.data.reading import read_class, read_prompts


def examples_of(texts: Sequence[str], file: Path | None = None) -> list[Example]:
    """Plain texts and the examples of a file; without either, openings of plain texts. Raises ExampleError."""
    examples = [Example(text, origin=f"text {n}") for n, text in enumerate(texts, 1)]
    if file is not None:
        examples += read_class(file, "--texts")[0]
    return examples or [Example(text, origin=f"opening {n}") for n, text in enumerate(OPENINGS, 1)]


def contexts_of(prompts: Sequence[str], file: Path | None = None) -> list[Example]:
    """Prompts and those of a file; without either, everyday prompts. Raises ExampleError."""
    every = [*prompts, *([] if file is None else read_prompts(file)[0])] or list(PROMPTS)
    return [Example("", prompt, origin=f"prompt {n}") for n, prompt in enumerate(every, 1)]
