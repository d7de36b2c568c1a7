"""A prompt and what follows it: one turn of a chat with a chat model, plain text with a base model.

Either may be a list of messages, as in TRL's conversational sets.

TRL's unpaired preference sets (KTO) also have a `label`, which says whether the completion is a desired one.
"""

from __future__ import annotations

from typing import Any

from probes.data.examples import Example, Message
from probes.data.fields import stated_class, text, turns

KEYS = frozenset({"prompt", "completion"})
SHAPE = '{"prompt","completion"}'


def parse(record: dict[str, Any], origin: str) -> list[Example]:
    """One example whose context is the prompt; of several messages in the completion, the last is the completion."""
    label, stated = stated_class(record)
    prompt, completion = record["prompt"], record["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        context: str | tuple[Message, ...] = text(record, "prompt")
        return [Example(text(record, "completion"), context, label=label, origin=origin, stated=stated)]
    before = turns(record, "prompt") if isinstance(prompt, list) else (Message("user", text(record, "prompt")),)
    after = (
        turns(record, "completion")
        if isinstance(completion, list)
        else (Message("assistant", text(record, "completion")),)
    )
    *context_turns, last = (*before, *after)
    return [Example(last.content, tuple(context_turns), last.role, label=label, origin=origin, stated=stated)]
