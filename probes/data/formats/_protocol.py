"""The contract of a form of examples: a module with these names."""

from __future__ import annotations

from typing import Any, Protocol

from probes.data.examples import Example


class ExampleFormat(Protocol):
    """What a file of formats/ must define."""

    KEYS: frozenset[str]  # those that every line of this form has; of several forms that fit, the most keys win
    SHAPE: str  # a line of this form in short, for messages: '{"prompt","completion"}'

    def parse(self, record: dict[str, Any], origin: str) -> list[Example]:
        """The examples of one line; `origin` is the line as messages name it, such as `warm.jsonl:3`.

        Raises ValueError with what is wrong, as a phrase that follows the origin. `probes/data/fields.py` reads texts.
        """
