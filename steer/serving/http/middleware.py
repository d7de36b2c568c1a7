"""HTTP: arms as model names, refusals before anything runs, receipts in the answer. A request without steering passes
as it is, untouched.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from steer.serving.engine import receipts
from steer.serving.engine.admission import Admission, explain
from steer.serving.engine.resolved import EXPRESSION, RESOLVED
from vectors.errors import SteerError

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

STEERED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
# vLLM drops vllm_xargs here, so what asks for steering is refused.
UNSTEERED = ("/v1/chat/completions/batch", "/cohere/v2/chat")
# What in an event says that it may be the last one with content; it is parsed only then.
LAST = (b'"finish_reason":"', b'"response.completed"', b'"response.incomplete"', b'"message_stop"')
BACKGROUND = ("queued", "in_progress")  # of a response that is asked for later


class _Refusal(Exception):
    """A request that ends here, with its status and reason."""

    def __init__(self, status: int, kind: str, parameter: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": parameter, "code": status}}


class Middleware:
    """ASGI middleware. `find` gives the admission, and the names that requests may use for the served models."""

    def __init__(self, app: Any, find: Callable[[], tuple[Admission, Callable[[str], bool]] | None]) -> None:
        self.app, self.find = app, find

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        asked = scope["type"] == "http" and scope["method"] == "POST" and path in STEERED + UNSTEERED
        found = self.find() if asked else None
        if found is None:
            await self.app(scope, receive, send)
            return
        body = await _body(receive)
        try:
            request = _request(path, body, *found)
        except _Refusal as refusal:
            await _answer(send, refusal.status, refusal.body)
            return
        if request is None:
            await self.app(scope, _replay(body, receive), send)
            return
        content, arm, digest, names = request
        scope = {**scope, "headers": [*_without(scope["headers"], b"content-length"), _length(content)]}
        sheet = receipts.Sheet(arm)
        receipts.use(sheet)
        await self.app(scope, _replay(content, receive), _Answer(send, sheet, digest, names))


def _request(
    path: str, body: bytes, admission: Admission, served: Callable[[str], bool]
) -> tuple[bytes, str | None, str, tuple[str, str] | None] | None:
    """What a steered request becomes: its body for vLLM, arm, digest, and (model served, model asked for).

    None for a request that is not steered, or that vLLM will refuse itself. Raises _Refusal.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    extra, model, arm, names = value.get("vllm_xargs"), value.get("model"), None, None
    asked = extra.get(EXPRESSION) if isinstance(extra, dict) else None
    if isinstance(extra, dict) and RESOLVED in extra:
        raise _Refusal(400, "BadRequestError", "vllm_xargs", f"{RESOLVED} is not for clients; ask with {EXPRESSION}")
    if isinstance(model, str) and ":" in model and not served(model):
        base, _, arm = model.rpartition(":")
        if served(base):
            if arm not in admission.settings.arms:
                known = ", ".join(f"{base}:{name}" for name in admission.settings.arms) or "none"
                raise _Refusal(404, "NotFoundError", "model", f"there is no arm {arm!r} of {base}; arms: {known}")
            if asked is not None:
                raise _Refusal(
                    400,
                    "BadRequestError",
                    "vllm_xargs",
                    f"the request names the arm {arm!r} and steer {asked!r}: give one",
                )
            asked, names = str(admission.settings.arms[arm]), (base, model)
            value = {**value, "model": base, "vllm_xargs": {**(extra or {}), EXPRESSION: asked}}
            body = json.dumps(value).encode()
        else:
            arm = None
    if asked is None:
        return None
    unsteered = path if path in UNSTEERED else "beam search" if value.get("use_beam_search") else None
    if unsteered is not None:
        raise _Refusal(
            400, "BadRequestError", "vllm_xargs.steer", f"{unsteered} can't be steered: vLLM passes it no expression"
        )
    try:
        _, resolved = admission.read(asked)
    except SteerError as error:
        raise _Refusal(400, "BadRequestError", "vllm_xargs.steer", explain(error)) from error
    return body, arm, resolved.key, names


class _Answer:
    """Sends an answer on, with its headers and receipt: a whole body is held back, a stream only passes through."""

    def __init__(self, send: Send, sheet: receipts.Sheet, digest: str, names: tuple[str, str] | None) -> None:
        self.send, self.sheet, self.digest, self.names = send, sheet, digest, names
        self.start: Message = {}
        self.kind = "other"
        self.held = b""
        self.finished = 0  # answers whose last chunk has passed
        self.done = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body" and self.kind == "json":
            self.held += message.get("body", b"")
            if not message.get("more_body"):
                content = self._whole(self.held)
                if content is None:
                    await _answer(self.send, 500, _withheld())
                    return
                await self.send({**self.start, "headers": [*self.start["headers"], _length(content)]})
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
        headers.append((b"x-steer-digest", self.digest.encode()))
        if self.sheet.arm is not None:
            headers.append((b"x-steer-arm", self.sheet.arm.encode("utf-8")))
        self.start = {**message, "headers": headers}
        if kind.startswith(b"application/json"):
            self.kind = "json"
            self.start["headers"] = _without(headers, b"content-length")
            return
        self.kind = "stream" if kind.startswith(b"text/event-stream") else "other"
        await self.send(self.start)

    def _whole(self, body: bytes) -> bytes | None:
        """An answer with its receipt; None when the engine never took in a steered request for it."""
        value = json.loads(body)
        if not self.sheet.expected and value.get("status") not in BACKGROUND:
            return None
        if self.names is not None and value.get("model") == self.names[0]:
            value["model"] = self.names[1]
        value["steer"] = self.sheet.total()
        return _compact(value)

    def _events(self, body: bytes, more: bool) -> bytes:
        """Whole events of a stream; what is not yet whole is kept for the next message."""
        self.held += body
        whole, end, self.held = self.held.rpartition(b"\n\n") if more else (self.held, b"", b"")
        events = (whole + end).split(b"\n\n")
        return b"\n\n".join(self._event(event) for event in events)

    def _event(self, event: bytes) -> bytes:
        if self.names is not None:
            # Quotes inside strings are escaped, so this pattern occurs only where the field is.
            served, asked = (b'"model":' + json.dumps(name).encode() for name in self.names)
            event = event.replace(served, asked)
        if self.done:
            return event
        if any(mark in event for mark in LAST):
            if not self.sheet.expected:
                self.done = True
                return b"data: " + _compact(_withheld())
            head, _, data = event.partition(b"data: ")
            value = json.loads(data)
            # Several answers end in chunks of their own; other events that end a stream end all of it.
            choices = value.get("choices")
            ended = [one for one in choices if one.get("finish_reason")] if choices is not None else self.sheet.expected
            self.finished += len(ended)
            if self.finished < len(self.sheet.expected) or not self.sheet.complete:
                return event
            value["steer"] = self.sheet.total()
            self.done = True
            return head + b"data: " + _compact(value)
        if event == b"data: [DONE]" and self.sheet.complete:
            self.done = True
            receipt = _compact({"object": "steer.receipt", "choices": [], "steer": self.sheet.total()})
            return b"data: " + receipt + b"\n\n" + event
        return event


def _withheld() -> Any:
    """What is said instead of an answer that was to be steered and was not: it must not happen."""
    message = "this answer was not steered as asked, and is withheld; please report it"
    return {"error": {"message": message, "type": "InternalServerError", "code": 500}}


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body again, and afterwards whatever comes: a disconnect."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(send: Send, status: int, value: Any) -> None:
    content = _compact(value)
    headers = [(b"content-type", b"application/json"), _length(content)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def _without(headers: Any, unwanted: bytes) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() != unwanted]


def _length(content: bytes) -> tuple[bytes, bytes]:
    return b"content-length", str(len(content)).encode()


def _compact(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
