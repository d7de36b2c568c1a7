"""Preferences as TRL takes them: a chosen and a rejected completion of a prompt, as texts or as messages.

`chosen` and `rejected` may hold the whole conversation, with the prompt given beside them or not at all; then their
common beginning is the prompt (as in the hh-rlhf and UltraFeedback data sets).
"""

from __future__ import annotations

from typing import Any

from probes.data.examples import Example, Message
from probes.data.fields import text, turns

KEYS = frozenset({"chosen", "rejected"})
SHAPE = '{"prompt","chosen","rejected"}'


def parse(record: dict[str, Any], origin: str) -> list[Example]:
    """The chosen completion as the positive example, and the rejected one as the negative."""
    prompt = record.get("prompt")
    elsewhere = next((key for key in ("instruction", "conversations", "question", "messages") if key in record), None)
    if prompt is None and elsewhere is not None:
        raise ValueError(f"chosen and rejected stand beside {elsewhere}, not beside prompt: write it as prompt")
    if isinstance(record["chosen"], list) != isinstance(record["rejected"], list):
        raise ValueError("chosen and rejected must both be texts, or both messages")
    if not isinstance(record["chosen"], list):
        chosen, rejected = text(record, "chosen"), text(record, "rejected")
        if isinstance(prompt, list):
            raise ValueError("prompt holds messages, so chosen and rejected must hold messages too")
        if prompt is None:
            context: str | None = chosen[: _common(chosen, rejected)]
            start = len(context or "")
            chosen, rejected = chosen[start:], rejected[start:]
            if not chosen.strip() or not rejected.strip():
                raise ValueError("chosen and rejected differ in nothing but their length; give the prompt")
        else:
            context = text(record, "prompt")
        sides = [Example(side, context or None, origin=origin) for side in (chosen, rejected)]
    else:
        before = turns(record, "prompt") if isinstance(prompt, list) else ()
        sides = [_conversation(record, key, before, prompt, origin) for key in ("chosen", "rejected")]
        if sides[0].context != sides[1].context:
            raise ValueError("chosen and rejected answer different conversations")
    if sides[0].completion == sides[1].completion:
        raise ValueError("chosen and rejected are the same")
    return [side._replace(label=label, pair=origin) for side, label in zip(sides, (True, False), strict=True)]


def _conversation(record: dict[str, Any], key: str, before: tuple[Message, ...], prompt: Any, origin: str) -> Example:
    conversation = turns(record, key)
    if conversation[: len(before)] != before:
        conversation = (*before, *conversation)
    if len(conversation) == 1 and isinstance(prompt, str):
        conversation = (Message("user", text(record, "prompt")), *conversation)
    return Example(conversation[-1].content, conversation[:-1], conversation[-1].role, origin=origin)


def _common(chosen: str, rejected: str) -> int:
    """The length of the longest prefix of whole words that both texts have."""
    differing = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    length = next(differing, min(len(chosen), len(rejected)))
    while length and not chosen[length - 1].isspace():
        length -= 1
    return len(chosen[:length].rstrip())
