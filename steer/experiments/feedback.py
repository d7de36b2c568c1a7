"""Feedback about answers: what a client may send to /v1/feedback, and the row that it becomes.

{"response_id": "chatcmpl-…", "metric": "thumbs", "value": true}
{"conversation_id": "…", "metric": "stars", "value": 4, "comment": "…", "idempotency_key": "…"}
{"response_id": "…", "metric": "answer", "demonstration": "a better answer", "prompt": [{"role": "user", …}]}
"""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from steer.experiments.specification import Experiment, Metric
from vectors.documents import schema
from vectors.storage.files import canonical_json

LARGEST = 256 * 1024  # bytes of the body
GREATEST = 1e15  # of a value: a database must be able to add up the squares of all

_ANY_ID = r"[^\0]{1,512}"
_ID = schema.text(_ANY_ID, "text of 1 to 512 characters")
_TEXT = schema.text(longest=100_000)
_MESSAGES = schema.list_of(schema.record({"role": schema.text(longest=40)}), 1000)
_FEEDBACK = schema.record(
    {},
    {
        "metric": schema.text(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", "the name of a metric"),
        "response_id": _ID, "conversation_id": _ID, "experiment": _ID, "idempotency_key": _ID,
        "value": schema.either(schema.boolean, schema.number, wanted="true, false or a number"),
        "comment": _TEXT, "demonstration": _TEXT,
        "prompt": schema.either(_TEXT, _MESSAGES, wanted="text, or a list of messages"),
    },
)  # fmt: skip
_FIELDS = (
    "metric", "response_id", "conversation_id", "experiment", "idempotency_key", "value", "comment", "demonstration",
    "prompt",
)  # fmt: skip


def problems_of(body: Any, metrics: Mapping[str, Metric]) -> list[str]:
    """What is wrong with the body of a request; `metrics` are those of the experiment."""
    return schema.problems_of(body, lambda value, name: _check(value, name, metrics))


def _check(body: Any, name: str, metrics: Mapping[str, Metric]) -> Iterator[str]:
    yield from _FEEDBACK(body, name)
    if not isinstance(body, Mapping):
        return
    yield from (f"feedback has no field {schema.excerpt(key)}" for key in body if key not in _FIELDS)
    if ("response_id" in body) == ("conversation_id" in body):
        yield "give either response_id or conversation_id"
    if not any(key in body for key in ("value", "comment", "demonstration")):
        yield "give a value, a comment or a demonstration"
    metric = metrics.get(body["metric"]) if isinstance(body.get("metric"), str) else None
    if metric is None:
        if "value" in body and "metric" not in body:
            yield f"metric is missing; metrics: {', '.join(metrics)}"
        elif "value" in body:
            yield f"the experiment has no metric {schema.excerpt(body.get('metric'))}; metrics: {', '.join(metrics)}"
        return
    if metric.source == "server" and "value" in body:
        yield f"the server computes the metric {metric.name} itself"
    value = body.get("value")
    if metric.kind == "bool" and "value" in body and not (isinstance(value, bool) or value in (0, 1)):
        yield f"value is {schema.excerpt(value)}, and the metric {metric.name} is true or false"
    if metric.kind == "number" and isinstance(value, bool):
        yield f"value is {schema.excerpt(value)}, and the metric {metric.name} is a number"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) < GREATEST:
            yield f"value is {schema.excerpt(value)}, not below {GREATEST:g} in size"
        low, high = metric.low, metric.high
        if (low is not None and value < low) or (high is not None and value > high):
            yield f"value is {schema.excerpt(value)}, outside of the metric's range from {low} to {high}"


def response_known_as(identity: str) -> str:
    """What the log knows a response by: its id, or the SHA-256 of one that feedback could not name.

    Clients choose ids, of any length; what is longer than an index of PostgreSQL takes would never reach the log.
    """
    if re.fullmatch(_ANY_ID, identity):
        return identity
    return f"sha256:{hashlib.sha256(identity.encode('utf-8', 'surrogatepass')).hexdigest()}"


def row_of(
    body: Mapping[str, Any], experiment: Experiment, *, conversation: str | None, version: int | None, mark: str,
    source: str = "user",
) -> dict[str, Any]:  # fmt: skip
    """The row of `feedback` for a checked body. `conversation` is the salted hash of its conversation_id.

    With an idempotency key, or from a judge, the row has the same id whenever it is sent. A client that sends one key
    for several answers, or metrics, has a row for each.
    """
    key = body.get("idempotency_key")
    # Comments and demonstrations count for no metric, and need not name one.
    metric = body.get("metric", "demonstration" if "demonstration" in body else "comment")
    row_id = uuid.uuid4().hex
    if key is not None:
        about = body.get("response_id"), conversation, metric
        text = canonical_json([experiment.name, source, key, *about]).encode("utf-8", "surrogatepass")
        row_id = hashlib.sha256(text).hexdigest()[:32]
    prompt, value = body.get("prompt"), body.get("value")
    return {
        "id": row_id,
        "experiment": experiment.name,
        "version": version,
        "response": body.get("response_id"),
        "conversation": conversation,
        "metric": metric,
        "value": None if value is None else float(value),
        "comment": body.get("comment"),
        "demonstration": body.get("demonstration"),
        "prompt": None if prompt is None else canonical_json(prompt),
        "source": source,
        "mark": mark,
        "at": time.time(),
    }
