"""Contrasting examples: what shows a behaviour, and what shows its opposite."""

from __future__ import annotations

from typing import NamedTuple


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


class Example(NamedTuple):
    """One example. The tokens of `completion` are those that count by default.

    `context` is what comes before it: None for a plain text, a string for a prompt, messages for a conversation.
    `role` is the role of the completion's turn in a conversation. `label` is the class (True: positive) where the line
    itself states it, and `stated` the label as it is written there, which may say neither class. Two examples with an
    equal `pair` are a pair. `origin` is FILE:LINE, for messages. Examples with an equal `group`, such as those of one
    template or concept, are never on both sides of a split.
    """

    completion: str
    context: str | tuple[Message, ...] | None = None
    role: str = "assistant"
    label: bool | None = None
    pair: str | None = None
    origin: str = ""
    stated: str = ""
    group: str = ""

    @property
    def content(self) -> tuple[object, ...]:
        """Context, role and completion: what two examples must share to count as equal."""
        return (self.context, self.role, self.completion)
