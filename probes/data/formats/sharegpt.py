"""A conversation as ShareGPT has it: turns of `from` and `value`; the last one is the completion.

A `system` beside the turns, as LLaMA-Factory has it, is the first turn.
"""

from __future__ import annotations

from typing import Any

from probes.data.examples import Example, Message
from probes.data.fields import stated_class, text

KEYS = frozenset({"conversations"})
SHAPE = '{"conversations":[{"from","value"},...]}'
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip


def parse(record: dict[str, Any], origin: str) -> list[Example]:
    """One example whose context is every turn but the last."""
    listed = record["conversations"]
    if not isinstance(listed, list) or not listed or not all(isinstance(turn, dict) for turn in listed):
        raise ValueError("conversations must be a list of at least one {from, value}")
    turns = [_turn(turn) for turn in listed]
    if isinstance(record.get("system"), str) and record["system"].strip() and turns[0].role != "system":
        turns.insert(0, Message("system", text(record, "system")))
    label, stated = stated_class(record)
    return [Example(turns[-1].content, tuple(turns[:-1]), turns[-1].role, label=label, origin=origin, stated=stated)]


def _turn(turn: dict[str, Any]) -> Message:
    if "role" in turn and "from" not in turn:  # some sets keep the key and write turns as messages
        return Message(text(turn, "role"), text(turn, "content"))
    speaker = text(turn, "from")
    if speaker not in _ROLES:
        raise ValueError(f"a turn is from {speaker[:40]!r}, not human, gpt or system")
    return Message(_ROLES[speaker], text(turn, "value"))
