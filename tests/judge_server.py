"""A judge that runs: an HTTP server of the standard library on loopback that answers as a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# From the request's body to a text, which becomes a chat completion, or to (status, headers, body), sent as they are.
Answer = Callable[[dict[str, Any]], str | tuple[int, dict[str, str], bytes]]


class Judge(ThreadingHTTPServer):
    """The server; `requests` are the bodies and `headers` the headers of what it was sent, in order of arrival."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, **body})
        self.server.headers.append(dict(self.headers))
        answered = self.server.answer(body)
        if isinstance(answered, str):
            value = {"choices": [{"index": 0, "message": {"role": "assistant", "content": answered}}]}
            answered = (200, {"Content-Type": "application/json"}, json.dumps(value).encode())
        status, headers, content = answered
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def judge(answer: Answer) -> Iterator[Judge]:
    """A judge that answers every request by `answer`."""
    with Judge(answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(body: dict[str, Any]) -> str:
    """The question in a request."""
    text: str = body["messages"][0]["content"]
    return text
