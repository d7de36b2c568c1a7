"""POST /v1/feedback: finds the answer that it is about, and acknowledges it once it is on disk or in the database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from steer.experiments import feedback
from steer.experiments.assignment import hashed
from steer.experiments.running.live import Live
from steer.experiments.storage.tables import EXPOSURES
from steer.serving.http import bodies, exposure_metrics
from steer.serving.http.answers import Message
from vectors.documents import json_text

T = TypeVar("T")
WAIT = 5.0  # seconds for the database, where the journal can't be written
FIND = 1.0  # seconds to look for an answer in the database
VALUES = 10_000  # of the body
_UNKNOWN, _LATE = "unknown", "late"

# Of our own: a database that does not answer must not take the threads that vLLM needs.
_THREADS = ThreadPoolExecutor(4, thread_name_prefix="steer-feedback")

Answer = tuple[int, dict[str, Any]]  # status and body


async def receive(scope: Message, receive_message: bodies.Receive, lives: Mapping[str, Live]) -> Answer:
    """The answer to a request, given its ASGI scope and receive and the experiments that run, by name.

    Raises bodies.TooLarge, before the body is read where its length is announced.
    """
    if not lives:
        return _error(404, "this server runs no experiment")
    bodies.require_announced(scope, feedback.LARGEST, bodies.SHORTER)
    content = await bodies.read(receive_message, feedback.LARGEST, bodies.SHORTER)
    if content is None:
        return _error(499, "the client has disconnected")
    try:
        body = json_text.parse(content, values=VALUES)
    except ValueError as error:
        return _error(400, str(error))
    if not isinstance(body, dict):
        return _error(400, "the body is no object")
    name = body.get("experiment")
    if name is not None and (not isinstance(name, str) or name not in lives):
        return _error(404, f"this server runs no experiment {str(name)[:64]!r}; it runs {', '.join(lives)}")
    problems = feedback.problems_of(body, {} if len(lives) > 1 else next(iter(lives.values())).experiment.metrics())
    if len(lives) > 1:
        problems = [problem for problem in problems if "no metric" not in problem]
    if problems:
        return _error(400, "; ".join(problems))
    found = await _find(body, lives)
    if found is None and name is None and len(lives) > 1:
        return _error(400, f"the answer is not known; name the experiment: {' or '.join(lives)}")
    experiment, version, stopped = found if found is not None else (name or next(iter(lives)), None, False)
    if experiment not in lives or (name is not None and experiment != name):
        return _error(409, f"the answer belongs to the experiment {experiment}, which is not {name or 'running here'}")
    live = lives[experiment]
    problems = feedback.problems_of(body, live.experiment.metrics())
    if problems:
        return _error(400, "; ".join(problems))
    mark = _UNKNOWN if version is None else _LATE if version != live.version or stopped else ""
    conversation = body.get("conversation_id")
    row = feedback.row_of(
        body, live.experiment, version=version, mark=mark,
        conversation=None if conversation is None else hashed(live.experiment.salt, conversation, "conversation"),
    )  # fmt: skip
    place = live.writer.add("feedback", row)
    if place == "dropped" or (place == "memory" and not await _in_thread(live.writer.flush, WAIT)):
        return _error(503, "the log can't be written now; send it again, with an idempotency_key")
    exposure_metrics.received(live, row["metric"])
    return 200, {"id": row["id"], "experiment": experiment, "mark": mark or None}


async def _in_thread(function: Callable[..., T], *arguments: object) -> T:
    return await asyncio.get_running_loop().run_in_executor(_THREADS, function, *arguments)


async def _find(body: Mapping[str, Any], lives: Mapping[str, Live]) -> tuple[str, int, bool] | None:
    """(experiment, version, whether it has been stopped) of the answer or conversation; None where it is not known."""
    response = body.get("response_id")
    for name, live in lives.items():
        if response is not None and (known := live.conversations.of_response(response)) is not None:
            return name, known.version, bool(live.state.stopped)
        if response is None:
            begun = live.conversations.find(hashed(live.experiment.salt, body["conversation_id"], "conversation"))
            if begun is not None:
                return name, begun.version, bool(live.state.stopped)
    for live in lives.values():
        try:
            row = await asyncio.wait_for(_in_thread(_in_log, live, body), FIND)
        except (SQLAlchemyError, TimeoutError):
            continue  # the database is away: the feedback is joined to its answer when it is read
        if row is not None:
            of = lives.get(row[0])
            return row[0], row[1], bool(of.state.stopped) if of is not None else True
    return None


def _in_log(live: Live, body: Mapping[str, Any]) -> tuple[str, int] | None:
    columns = EXPOSURES.c
    query = select(columns.experiment, columns.version).order_by(columns.at.desc()).limit(1)
    if "response_id" in body:
        query = query.where(columns.response == body["response_id"])
    else:
        query = query.where(
            columns.conversation == hashed(live.experiment.salt, body["conversation_id"], "conversation")
        )
    with live.engine.connect() as connection:
        row = connection.execute(query).first()
    return None if row is None else (row[0], row[1])


def _error(status: int, message: str) -> Answer:
    kinds = {404: "NotFoundError", 409: "ConflictError", 503: "ServiceUnavailableError"}
    return status, {"error": {"message": message, "type": kinds.get(status, "BadRequestError"), "code": status}}
