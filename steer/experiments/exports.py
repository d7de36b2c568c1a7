"""What leaves the log: its rows as JSON lines, demonstrations as training data, and the rows of a person for good."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import Engine, delete, or_, select

from steer.experiments.assignment import hashed
from steer.experiments.storage import forgetting, ratings, sums
from steer.experiments.storage.database import writing
from steer.experiments.storage.tables import EXPOSURES, FEEDBACK


def rows(engine: Engine, name: str, version: int | None = None) -> Iterator[dict[str, Any]]:
    """Every answer of an experiment with the feedback about it, in order; feedback about a conversation stands with the
    first answer of it. Raises SQLAlchemyError."""
    columns = EXPOSURES.c
    query = select(EXPOSURES).where(columns.experiment == name).order_by(columns.at, columns.id)
    if version is not None:
        query = query.where(columns.version == version)
    with engine.connect() as connection:
        about = (FEEDBACK.c.experiment == name) & FEEDBACK.c.conversation.is_not(None)
        by_conversation: dict[str, list[dict[str, Any]]] = {}
        for row in connection.execute(select(FEEDBACK).where(about).order_by(FEEDBACK.c.at)).mappings():
            by_conversation.setdefault(row["conversation"], []).append(_present(row))
        stream = connection.execution_options(stream_results=True).execute(query).mappings()
        for part in stream.partitions(500):
            responses = [row["response"] for row in part if row["response"] is not None]
            given = select(FEEDBACK).where(FEEDBACK.c.experiment == name, FEEDBACK.c.response.in_(responses))
            by_response: dict[str, list[dict[str, Any]]] = {}
            with engine.connect() as other:
                for row in other.execute(given.order_by(FEEDBACK.c.at)).mappings():
                    by_response.setdefault(row["response"], []).append(_present(row))
            for row in part:
                feedback = by_response.get(row["response"] or "", []) + by_conversation.pop(row["conversation"], [])
                yield {**_present(row), "feedback": feedback}


def _present(row: Any) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}


class Demonstration(NamedTuple):
    """A better answer that a client has sent: the prompt as messages, the better answer, and the one that was served.

    `prompt` is None where neither the log nor the feedback holds one, `answer` where the log holds none.
    """

    prompt: list[dict[str, str]] | None
    better: str
    answer: str | None


def demonstrations(engine: Engine, name: str) -> Iterator[Demonstration]:
    """The demonstrations among the feedback of an experiment, in order. Raises SQLAlchemyError."""
    given, shown = FEEDBACK.c, EXPOSURES.c
    query = (
        select(given.demonstration, given.prompt, shown.prompt, shown.answer)
        .select_from(FEEDBACK.outerjoin(EXPOSURES, (shown.response == given.response) & (shown.experiment == name)))
        .where(given.experiment == name, given.demonstration.is_not(None))
        .order_by(given.at, given.id)
    )
    with engine.connect() as connection:
        for better, sent, stored, answer in connection.execute(query):
            yield Demonstration(messages_of(sent or stored), better, answer)


def messages_of(text: str | None) -> list[dict[str, str]] | None:
    """Messages from the JSON of a prompt; None where there is none, or where a message is no text."""
    value = json.loads(text) if text else None
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        return None
    messages = []
    for message in value:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            return None
        messages.append({"role": message["role"], "content": content})
    return messages


def pair(demonstration: Demonstration) -> dict[str, Any] | None:
    """A line for `steer bake --pairs`: the better answer against the one that was served; None without both."""
    if demonstration.prompt is None or demonstration.answer is None or demonstration.answer == demonstration.better:
        return None
    sides = {"chosen": demonstration.better, "rejected": demonstration.answer}
    spoken = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    return {"prompt": demonstration.prompt, **spoken}


def example(demonstration: Demonstration) -> dict[str, Any] | None:
    """A line for `steer bake --data`: the conversation with the better answer; None without a prompt."""
    if demonstration.prompt is None:
        return None
    return {"messages": [*demonstration.prompt, {"role": "assistant", "content": demonstration.better}]}


class Forgotten(NamedTuple):
    """How many rows were removed."""

    answers: int
    feedback: int


def forget(engine: Engine, name: str, salt: str, unit: str) -> Forgotten:
    """Remove the rows of a unit, or of a conversation, for good: answers, and feedback about them.

    Those that servers have not written yet never arrive. Raises SQLAlchemyError.
    """
    # An earlier release took the bytes of a header for Latin-1.
    written = {unit, unit.encode("utf-8", "surrogatepass").decode("latin-1")}
    hashes = [hashed(salt, text, kind) for text in sorted(written) for kind in ("unit", "conversation")]
    shown, given = EXPOSURES.c, FEEDBACK.c
    theirs = or_(shown.unit.in_(hashes), shown.conversation.in_(hashes))
    with writing(engine) as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA secure_delete = ON")
        forgetting.lock(connection, "removing")
        sums.lock(connection)
        where = theirs & (shown.experiment == name)
        found = [dict(row) for row in connection.execute(select(EXPOSURES).where(where)).mappings()]
        responses = [row["response"] for row in found if row["response"] is not None]
        conversations = [*{row["conversation"] for row in found}, *hashes]
        feedback: list[Any] = []
        for column, values in ((given.response, responses), (given.conversation, conversations)):
            for start in range(0, len(values), 500):
                these = column.in_(values[start : start + 500]) & (given.experiment == name)
                removed = delete(FEEDBACK).where(these).returning(given.experiment, given.metric, given.mark)
                feedback += connection.execute(removed).mappings().all()
        answers = connection.execute(delete(EXPOSURES).where(where)).rowcount
        sums.remove(connection, found)
        ratings.count(connection, feedback, -1)
        forgetting.mark(connection, name, {*conversations}, responses)
    if engine.dialect.name == "sqlite":  # what was removed must not stay in the write-ahead log
        with engine.connect() as connection:
            connection.rollback()
            raw = connection.connection.driver_connection
            assert raw is not None
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return Forgotten(answers, len(feedback))
