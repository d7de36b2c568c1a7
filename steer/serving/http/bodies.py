"""Bodies of requests: bounded before they are read and while they are, read whole, and handed on.

vLLM's routes parse a body on the event loop, where a second request waits meanwhile, and parsing JSON can't be
interrupted. So its size is what bounds the time for which one client can hold up all others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from steer.serving.http.answers import Message, content_length, without_header

Receive = Callable[[], Awaitable[Message]]

PER_TOKEN = 32  # bytes of JSON for a token of the context: a word of English takes 5, a letter in escapes up to 12
SMALLEST = 1 << 20
MEDIA = 64 << 20  # for a model that reads images or audio, which a body holds in base64
# Lists and objects: where a list of messages holds something else, validation takes a hundred times as long as parsing,
# and kilobytes for each. A chat has up to six for each message, and a message takes more than twelve tokens.
CONTAINERS, PER_CONTAINER = 10_000, 2
SHORTER = "send a shorter request"
SETTING = f"{SHORTER}, or start the server with a larger --max-body (max_body in its settings)"
# A string, or all of the body after a quotation mark that opens one, so that no part of it is read twice.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


class TooLarge(Exception):
    """Raised for a body of more bytes than a server takes; `close` is true when the client has not begun to send it."""

    def __init__(self, what: str, limit: int, hint: str, *, close: bool = False) -> None:
        super().__init__(f"{what}, and this server takes at most {limit}; {hint}")
        self.close = close

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer, whose status is 413."""
        return {"error": {"message": str(self), "type": "RequestTooLargeError", "param": "body", "code": 413}}


class Limits(NamedTuple):
    """What the body of a request may have at most: bytes, and lists and objects."""

    size: int
    containers: int


def limits(size: int | None, context: int, *, media: bool) -> Limits:
    """The limits for a model with a context of so many tokens; `size` is that of the settings, None by default."""
    default = max(SMALLEST, PER_TOKEN * context, MEDIA if media else 0)
    return Limits(size or default, max(CONTAINERS, context // PER_CONTAINER))


def require_announced(scope: Message, limit: int, hint: str = SETTING) -> None:
    """Refuse a request by its Content-Length, before any of its body is read. Raises TooLarge."""
    length = header(scope, b"content-length")
    if length.isdigit() and (len(length) > 20 or int(length) > limit):
        # A client that waits for 100 Continue sends no body after a refusal, so its connection can't go on.
        waits = header(scope, b"expect").lower() == b"100-continue"
        raise TooLarge(f"the body has {length[:20].decode()} bytes", limit, hint, close=waits)


def require_few_containers(body: bytes, limit: int, *, form: bool = False) -> None:
    """Refuse a JSON body with more lists and objects than `limit`, before it is parsed. Raises TooLarge.

    Its encoding is found as `json.loads` finds it. A `form`, which may hold any bytes, is counted only if it begins as
    JSON does.
    """
    encoding = json.detect_encoding(body)
    if encoding != "utf-8":
        try:
            body = body.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")
        except ValueError:
            return  # nobody can parse it
    if form and body.lstrip()[:1] not in (b"[", b"{"):
        return

    def count(text: bytes) -> int:
        return text.count(b"[") + text.count(b"{")

    if count(body) > limit and (found := count(_STRING.sub(b"", body))) > limit:
        raise TooLarge(f"the body holds {found} lists and objects", limit, SHORTER)


async def read(receive: Receive, limit: int, hint: str = SETTING) -> bytes | None:
    """The whole body of a request; None when the client disconnects before its end. Raises TooLarge.

    After TooLarge the rest is left unread; the server discards it as it arrives, so that the connection stays usable.
    """
    parts = await read_parts(receive, limit, hint)
    return None if parts is None else b"".join(parts)


async def read_parts(receive: Receive, limit: int, hint: str) -> list[bytes] | None:
    """`read`, with the parts of the body not yet joined."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if size > limit:
            raise TooLarge(f"the body has more than {limit} bytes", limit, hint)
        if not message.get("more_body"):
            return parts


def replay(body: bytes, receive: Receive) -> Receive:
    """An ASGI receive that returns the body once more, and then later messages, such as a disconnect."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def with_length(scope: Message, body: bytes) -> Message:
    """The scope of a request with the Content-Length of this body."""
    return {**scope, "headers": [*without_header(scope["headers"], b"content-length"), content_length(body)]}


def is_form(scope: Message) -> bool:
    """Whether the request says that its body is a form, whose files may hold any bytes."""
    kind = header(scope, b"content-type").lower().partition(b";")[0].strip()
    return kind in (b"multipart/form-data", b"application/x-www-form-urlencoded")


def header(scope: Message, name: bytes) -> bytes:
    """The first value of a header, by its name in lower case; empty where there is none."""
    for key, value in scope["headers"]:
        if len(key) == len(name) and key.lower() == name:
            return bytes(value)
    return b""


def header_text(scope: Message, name: bytes) -> str:
    """The first value of a header as text: UTF-8, as clients send an id elsewhere and as its owner types it, or else
    Latin-1."""
    value = header(scope, name)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
