"""The options that name scorers and a judge of answers, for every request that has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vectors.errors import SteerError, UsageError
from vectors.registry import plugins
from vectors.registry.options import option

# Of the field `judge_key_file`.
KEY_FILE: Mapping[str, Any] = {
    "help": "A file with the judge's API key.", "default_text": "the key in STEER_JUDGE_KEY, if set",
}  # fmt: skip


class Judged(Protocol):
    """A request that may name a judge."""

    @property
    def judge(self) -> str | None:
        """The URL of a judge, or a file that describes it."""

    @property
    def judge_model(self) -> str | None:
        """Its model."""

    @property
    def judge_key_file(self) -> Path | None:
        """The file with its key."""

    @property
    def concept(self) -> str | None:
        """What it is asked about."""


def _scorers() -> list[str]:
    """The names of the scorers."""
    return plugins.names("steer.evaluation.scorers", "steer.scorers")


def scorer(group: str) -> Any:
    """The field `scorer`, of texts."""
    return option(
        (), help="A scorer of the answers: {names}, with its first setting; may be given several times.",
        names=_scorers, metavar="[NAME=]KIND:VALUE", group=group,
    )  # fmt: skip


def judge(group: str, what: str) -> Any:
    """The field `judge`; `what` says what it judges."""
    return option(
        None, help=f"A judge {what}: the URL of an OpenAI-compatible server, or a YAML file with url and model.",
        metavar="URL|FILE", group=group,
    )  # fmt: skip


def judge_model(group: str) -> Any:
    """The field `judge_model`."""
    return option(None, help="The judge's model, by name.", group=group)


def concept(group: str, does: str) -> Any:
    """The field `concept`; `does` says what the judge does with it."""
    return option(None, help=f'What the judge {does}, in words: "a warm, friendly tone".', metavar="TEXT", group=group)


def given(request: Judged) -> Mapping[str, Any]:
    """What is given about a judge besides where it is reached, by option."""
    values = {
        "--judge-model": request.judge_model, "--judge-key-file": request.judge_key_file, "--concept": request.concept,
    }  # fmt: skip
    return {word: value for word, value in values.items() if value is not None}


def errors_without_judge(request: Judged) -> list[SteerError]:
    """The error where something is given about a judge, and none is named."""
    if request.judge is not None or not (words := given(request)):
        return []
    return [UsageError(f"{', '.join(words)}: there is no judge", "name one: --judge URL, or --judge FILE.yaml")]
