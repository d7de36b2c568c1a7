"""Whether a text holds any word or phrase of a list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steer.evaluation.scorers._protocol import GeneratedText, Resources, Scored
from vectors.documents.json_text import read_bounded
from vectors.errors import UsageError
from vectors.registry.options import option
from vectors.storage.files import digest_file

SUMMARY = "share of responses that hold words of a list"
SOURCE = ""
UNIT = "share of texts"
GRADED = False
LARGEST = 10_000_000  # bytes of a list


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A file of words, or the words themselves, and how many of them a response must hold."""

    file: Path | None = option(None, help="A text file with a word or phrase per line; # begins a comment.")
    words: tuple[str, ...] = option((), help="The words or phrases.")
    at_least: int = option(1, help="The number of occurrences from which a response counts.", low=1)


def problems_of(settings: Settings) -> list[str]:
    """Why there are no words."""
    if bool(settings.file) == bool(settings.words):
        return ["words needs either file or words"]
    return [] if words_of(settings) else [f"the list {settings.file or 'words'} holds no words"]


def inputs_of(settings: Settings) -> dict[str, str]:
    """The digest of the list."""
    return {str(settings.file): digest_file(settings.file)} if settings.file else {}


def words_of(settings: Settings) -> list[str]:
    """The words or phrases of the list. Raises UsageError for a file that can't be read."""
    lines: Sequence[str] = settings.words
    if settings.file:
        try:
            lines = read_bounded(settings.file, LARGEST).decode("utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UsageError(f"the list {settings.file} can't be read: {reason}", "write a word per line") from error
        lines = [line.partition("#")[0] for line in lines]
    return [" ".join(line.split()) for line in lines if line.strip()]


def score(settings: Settings, texts: Sequence[GeneratedText], _resources: Resources) -> list[Scored]:
    """1 where at least so many of the words occur, as whole words in any case; the words found are the evidence."""
    # Longest first, so that a phrase is not taken for its first word. \b fails beside signs, and where words touch.
    phrases = sorted({word.casefold() for word in words_of(settings)}, key=lambda word: (-len(word), word))
    alternatives = "|".join(re.escape(phrase).replace(r"\ ", r"\s+") for phrase in phrases)
    pattern = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)")
    scored = []
    for text in texts:
        occurrences = pattern.findall(text.response.casefold())
        holds = len(occurrences) >= settings.at_least
        scored.append(Scored(float(holds), int(holds), occurrences[:20]))
    return scored
