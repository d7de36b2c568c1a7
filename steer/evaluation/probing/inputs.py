"""Texts and contexts that a command reads: typed, from a file, or those of the evaluation set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from probes.data.examples import Example
from probes.data.prompts import OPENINGS, PROMPTS
from probes.data.reading import read_class, read_prompts
from vectors.errors import SteerError, UsageError, collecting, raise_together


def examples_of(texts: Sequence[str], file: Path | None = None, *, chat: bool = False) -> list[Example]:
    """Plain texts, with `chat` user's turns, and the examples of a file; without either, openings of plain texts.

    Raises UsageError, ExampleError.
    """
    examples = [
        # A conversation of one turn is put into the template.
        Example(text, () if chat else None, role="user", origin=f"text {n}")
        for n, text in enumerate(texts, 1)
    ]
    errors = _empty("--text", texts)
    if file is not None:
        with collecting(errors):
            examples += read_class(file, "--texts")[0]
    raise_together(errors)
    return examples or [Example(text, origin=f"opening {n}") for n, text in enumerate(OPENINGS, 1)]


def contexts_of(prompts: Sequence[str], file: Path | None = None) -> list[Example]:
    """Prompts and those of a file; without either, everyday prompts. Raises UsageError, ExampleError."""
    every = list(prompts)
    errors = _empty("--prompt", prompts)
    if file is not None:
        with collecting(errors):
            every += read_prompts(file)[0]
    raise_together(errors)
    return [Example("", prompt, origin=f"prompt {n}") for n, prompt in enumerate(every or PROMPTS, 1)]


def _empty(word: str, texts: Sequence[str]) -> list[SteerError]:
    """The problems of texts without content, which are given as the option `word`."""
    problems = [f"{word} {n} is empty" for n, text in enumerate(texts, 1) if not text.strip()]
    return [UsageError(problems, f"give a text: {word} TEXT")] if problems else []
