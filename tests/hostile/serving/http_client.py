"""A small HTTP client that can also break the rules: hang up anywhere, and send bytes that are no request."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, NamedTuple

WAIT = 300.0  # seconds until an answer counts as missing


class Answer(NamedTuple):
    """An answer: its status (0 when the connection ended without one), headers in lower case, and body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def value(self) -> Any:
        """The JSON value of the body, or for a stream the list of its events; None for anything else."""
        try:
            if "event-stream" in self.headers.get("content-type", ""):
                lines = [line[6:] for line in self.body.split(b"\n") if line.startswith(b"data: ")]
                return [json.loads(line) for line in lines if line != b"[DONE]"]
            return json.loads(self.body)
        except ValueError:
            return None


class Client:
    """Requests to one server; `hang_up` in `send` ends the connection after so many bytes of the request or answer."""

    def __init__(self, host: str, port: int, key: str | None) -> None:
        self.host, self.port, self.key = host, port, key

    async def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        raw: bytes | None = None,
        kind: str = "application/json",
        key: str | None = None,
        hang_up: tuple[str, float] | None = None,
    ) -> Answer:
        """Send a request and read its answer.

        `hang_up` is ("request", share) to send that share of the request alone, ("wait", seconds) to leave before the
        answer, or ("answer", bytes) to leave in the middle of it.
        """
        content = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        head = [
            f"{method} {path} HTTP/1.1", f"Host: {self.host}:{self.port}", f"Content-Type: {kind}",
            f"Content-Length: {len(content)}", "Connection: close",
        ]  # fmt: skip
        if key or self.key:
            head.append(f"Authorization: Bearer {key or self.key}")
        whole = "\r\n".join(head).encode() + b"\r\n\r\n" + content
        return await self.send_bytes(whole, hang_up)

    async def send_bytes(self, whole: bytes, hang_up: tuple[str, float] | None = None) -> Answer:
        """Send these bytes, whatever they are, and read what comes back."""
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=1 << 24)
        received = b""
        try:
            how, amount = hang_up or ("", 0.0)
            writer.write(whole[: int(len(whole) * amount)] if how == "request" else whole)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            if how in ("request", "wait"):
                await asyncio.sleep(amount if how == "wait" else 0.05)
                return Answer(0, {}, b"")
            # A server may refuse a body before it is sent whole, and then reset the connection.
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(WAIT):
                    while part := await reader.read(1 << 16):
                        received += part
                        if how == "answer" and len(received) >= amount:
                            return Answer(0, {}, b"")
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        return _answer(received)


def _answer(received: bytes) -> Answer:
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    if not first.startswith("HTTP/"):
        return Answer(0, {}, received)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        whole = b""
        while body:
            size, _, body = body.partition(b"\r\n")
            length = int(size or b"0", 16)
            whole, body = whole + body[:length], body[length + 2 :]
        body = whole
    return Answer(int(first.split()[1]), headers, body)
