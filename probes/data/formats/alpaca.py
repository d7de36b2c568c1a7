"""Instructions as Alpaca has them: an instruction, an input that may be empty, and the output.

The prompt is the instruction, and the input below it: the model's chat template takes the place of Alpaca's own.
"""

from __future__ import annotations

from typing import Any

from probes.data.examples import Example, Message
from probes.data.fields import stated_class, text

KEYS = frozenset({"instruction", "output"})
SHAPE = '{"instruction","input","output"}'


def parse(record: dict[str, Any], origin: str) -> list[Example]:
    """One example whose completion is the output."""
    if _given(record.get("history")):
        raise ValueError("history holds earlier turns: write the conversation as messages")
    prompt = text(record, "instruction")
    if _given(record.get("input")):
        prompt = f"{prompt}\n\n{text(record, 'input')}"
    context: str | tuple[Message, ...] = prompt
    if record.get("system"):
        context = (Message("system", text(record, "system")), Message("user", prompt))
    label, stated = stated_class(record)
    return [Example(text(record, "output"), context, label=label, origin=origin, stated=stated)]


def _given(value: Any) -> bool:
    """Whether a field holds anything; a table writes an empty list as a text."""
    return bool(value) and str(value).strip() not in ("", "[]")
