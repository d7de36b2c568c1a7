"""Instructions as Alpaca has them: an instruction, an input that may be empty, and the output.

The prompt is the instruction, and the input below it: the model's chat template takes the place of Alpaca's own.
"""

from __future__ import annotations

from typing import Any

from probes.data.examples import Example, Message
from probes.data.fields import text

KEYS = frozenset({"instruction", "output"})
SHAPE = '{"instruction","input","output"}'


def parse(record: dict[str, Any], origin: str) -> list[Example]:
    """One example whose completion is the output."""
    if record.get("history"):
        raise ValueError("history holds earlier turns: write the conversation as messages")
    prompt = text(record, "instruction")
    if record.get("input") not in (None, ""):
        prompt = f"{prompt}\n\n{text(record, 'input')}"
    context: str | tuple[Message, ...] = prompt
    if record.get("system"):
        context = (Message("system", text(record, "system")), Message("user", prompt))
    return [Example(text(record, "output"), context, origin=origin)]
