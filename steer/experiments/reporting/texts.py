"""Sample conversations for a report, where the experiment stores texts."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Engine, select, true

from steer.experiments.storage.tables import EXPOSURES, TALLIES

EACH = 3  # of every arm
LONGEST = 600  # characters of a prompt or an answer


def conversations(engine: Engine, name: str, version: int) -> list[dict[str, str]]:
    """The first answers of every arm that count, with the last message of their prompts. Raises SQLAlchemyError."""
    columns, tallies = EXPOSURES.c, TALLIES.c
    with engine.connect() as connection:
        arms = connection.execute(
            select(tallies.arm).where(tallies.experiment == name, tallies.version == version).distinct()
        )
        found: list[dict[str, str]] = []
        for arm in sorted(arm for (arm,) in arms):
            query = (
                select(columns.prompt, columns.answer)
                .where(columns.experiment == name, columns.version == version, columns.arm == arm,
                       columns.counted == true(), columns.status == 200, columns.answer.is_not(None))
                .order_by(columns.at, columns.id).limit(EACH)
            )  # fmt: skip
            for prompt, answer in connection.execute(query):
                found.append({"arm": arm, "prompt": _last_message(prompt)[:LONGEST], "answer": answer[:LONGEST]})
    return found


def _last_message(prompt: str | None) -> str:
    """The text that an answer answers, of a prompt as the log has it."""
    try:
        value: Any = json.loads(prompt or '""')
    except ValueError:
        return prompt or ""
    if isinstance(value, list) and value:
        value = value[-1]
    content = value.get("content") if isinstance(value, dict) else value
    if isinstance(content, list):
        content = " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else json.dumps(content)
