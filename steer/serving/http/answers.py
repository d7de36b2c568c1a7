"""The answer to a steered request: adds the headers, the name of the arm, and the receipt."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from steer.serving.engine.receipts import HttpRequest

Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]

# Marks of an event that may be the last one with content. Only events with one of these are parsed.
LAST = (b'"finish_reason":"', b'"response.completed"', b'"response.incomplete"', b'"message_stop"')
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
BACKGROUND = ("queued", "in_progress")  # statuses of a response that the client fetches later


class SteeredAnswer:
    """An ASGI send that adds headers and the receipt: a JSON body is sent when it is whole, a stream event by event.

    `names` are (served model, requested model) for an arm: the answer names the requested one.
    """

    def __init__(self, send: Send, request: HttpRequest, names: tuple[str, str] | None) -> None:
        self.send, self.request, self.names = send, request, names
        self.start: Message = {}
        self.kind = "other"
        self.parts: list[bytes] = []  # of a JSON body, joined at its end
        self.held = b""  # the incomplete last event of a stream
        self.finished = 0  # answers whose last chunk has been sent
        self.done = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body" and self.kind == "json":
            self.parts.append(message.get("body", b""))
            if not message.get("more_body"):
                content = self._whole(b"".join(self.parts))
                if content is None:
                    await send_json(self.send, 500, _withheld())
                    return
                await self.send({**self.start, "headers": [*self.start["headers"], content_length(content)]})
                await self.send({"type": "http.response.body", "body": content})
        elif message["type"] == "http.response.body" and self.kind == "stream":
            await self.send(
                {**message, "body": self._events(message.get("body", b""), message.get("more_body", False))}
            )
        else:
            await self.send(message)

    async def _begin(self, message: Message) -> None:
        headers = list(message.get("headers", []))
        kind = b"".join(value for name, value in headers if name.lower() == b"content-type")
        if message["status"] != 200:
            await self.send(message)
            return
        headers.append((b"x-steer-digest", self.request.resolved.key.encode()))
        if self.request.arm is not None:
            headers.append((b"x-steer-arm", self.request.arm.encode("utf-8")))
        if self.request.version is not None:
            headers.append((b"x-steer-commit", self.request.version["commit"].encode()))
        self.start = {**message, "headers": headers}
        if kind.startswith(b"application/json"):
            self.kind = "json"
            self.start["headers"] = without_header(headers, b"content-length")
            return
        self.kind = "stream" if kind.startswith(b"text/event-stream") else "other"
        await self.send(self.start)

    def _whole(self, body: bytes) -> bytes | None:
        """The JSON body with its receipt; None when no steered request reached the engine."""
        value = json.loads(body)
        if value is None:  # the client has disconnected, and vLLM returns nothing
            return body
        if not isinstance(value, dict):
            return None
        if not self.request.expected and value.get("status") not in BACKGROUND:
            return None
        if self.names is not None and value.get("model") == self.names[0]:
            value["model"] = self.names[1]
        value["steer"] = self.request.total()
        self.request.answered(str(value.get("id", "")))
        return compact_json(value)

    def _events(self, body: bytes, more: bool) -> bytes:
        """The complete events of a stream so far; an incomplete one waits for the next message."""
        self.held += body
        whole, end, self.held = self.held.rpartition(b"\n\n") if more else (self.held, b"", b"")
        events = (whole + end).split(b"\n\n")
        return b"\n\n".join(self._event(event) for event in events)

    def _event(self, event: bytes) -> bytes:
        if self.names is not None:
            # Quotes inside JSON strings are escaped, so this pattern matches the field alone.
            served, requested = (b'"model":' + json.dumps(name).encode() for name in self.names)
            event = event.replace(served, requested)
        if self.done:
            return event
        if any(mark in event for mark in LAST):
            if not self.request.expected:
                self.done = True
                return b"data: " + compact_json(_withheld())
            head, _, data = event.partition(b"data: ")
            value = json.loads(data)
            # In a stream with choices each answer ends in a chunk of its own; any other final event ends all answers.
            choices = value.get("choices")
            ended = (
                [choice for choice in choices if choice.get("finish_reason")]
                if choices is not None
                else self.request.expected
            )
            self.finished += len(ended)
            if self.finished < len(self.request.expected) or not self.request.complete:
                return event
            value["steer"] = self.request.total()
            self.request.answered(str((value.get("response") or value).get("id", "")))
            self.done = True
            return head + b"data: " + compact_json(value)
        if event == b"data: [DONE]" and self.request.complete:
            self.done = True
            receipt = compact_json({"object": "steer.receipt", "choices": [], "steer": self.request.total()})
            return b"data: " + receipt + b"\n\n" + event
        return event


def _withheld() -> Any:
    """The error in place of an answer that should have been steered and was not, which is a defect of steer."""
    message = "this answer was not steered as requested and is withheld; please report this"
    return {"error": {"message": message, "type": "InternalServerError", "code": 500}}


async def send_json(send: Send, status: int, value: Any, *, close: bool = False) -> None:
    """Send a whole JSON answer, and with `close` end the connection after it."""
    content = compact_json(value)
    headers = [(b"content-type", b"application/json"), content_length(content)]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def without_header(headers: Any, unwanted: bytes) -> list[tuple[bytes, bytes]]:
    """The headers without those of this name, given in lower case."""
    return [(name, value) for name, value in headers if name.lower() != unwanted]


def content_length(content: bytes) -> tuple[bytes, bytes]:
    """The content-length header of a body."""
    return b"content-length", str(len(content)).encode()


def compact_json(value: Any) -> bytes:
    """A JSON value as UTF-8 without spaces; where a client's text is no valid Unicode, in escapes."""
    try:
        return _ENCODE(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()
