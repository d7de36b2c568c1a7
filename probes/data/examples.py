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
    `role` is who says the completion in a conversation. `label` is the class where the line itself states it, `pair`
    what makes two examples a pair, `origin` the file and line for messages.
    """

    completion: str
    context: str | tuple[Message, ...] | None = None
    role: str = "assistant"
    label: bool | None = None
    pair: str | None = None
    origin: str = ""

    @property
    def content(self) -> tuple[object, ...]:
        """What is said, without where it came from: equal for equal examples."""
        return (self.context, self.role, self.completion)
