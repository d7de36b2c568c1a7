"""Asking a judge: many requests at once, each tried again with growing waits, until the judge is seen to be down."""

from __future__ import annotations

import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from steer.evaluation.judging.endpoint import Endpoint
from vectors.documents import json_text
from vectors.errors import cut
from vectors.events import Event, OnEvent, ignore

LARGEST = 4_000_000  # bytes of an answer
LONGEST_WAIT = 30.0  # seconds between two tries, also where the judge asks for more
GIVE_UP = 3  # requests in a row that failed after all tries: the judge is down, and the rest is not sent
REFUSED = (401, 403, 404)  # what every further request would get too
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)


class Reply(NamedTuple):
    """What a judge wrote; None where there is no answer, and then why."""

    text: str | None
    problem: str = ""


class _Failure(Exception):
    """A request without an answer: whether another try may help, when, and whether all others would fail too."""

    def __init__(self, problem: str, *, again: bool = False, wait: float = 0.0, final: bool = False) -> None:
        super().__init__(problem)
        self.again, self.wait, self.final = again, wait, final


def ask(
    endpoint: Endpoint,
    prompts: Sequence[str],
    on_event: OnEvent = ignore,
    *,
    stage: str = "judging",
    sleep: Callable[[float], None] = time.sleep,
) -> list[Reply]:
    """The judge's answer to each prompt, in the order of the prompts. Nothing is raised: what is missing says why.

    Equal prompts are sent once. A request is tried `endpoint.attempts` times where another try may help: no
    connection, no answer in time, too many requests, an error of the server. Once `GIVE_UP` requests in a row have
    failed, or the judge refuses the key or the URL, the others are not sent.
    """
    different = list(dict.fromkeys(prompts))
    state = _Judge(endpoint, sleep)
    waiting = iter(enumerate(different))
    lock = threading.Lock()
    arrived: queue.SimpleQueue[tuple[int, Reply | BaseException]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            with lock:
                entry = next(waiting, None)
            if entry is None:
                return
            try:
                arrived.put((entry[0], state.reply(entry[1])))
            except BaseException as error:  # a fault of ours, which must not leave the caller waiting
                arrived.put((entry[0], error))

    # Daemons, so that an interrupted program does not wait for answers.
    for _ in range(min(endpoint.concurrency, len(different))):
        threading.Thread(target=work, daemon=True).start()
    replies: dict[str, Reply] = {}
    on_event(Event(stage, 0, len(different), "answers"))
    for count in range(1, len(different) + 1):
        index, reply = arrived.get()
        if isinstance(reply, BaseException):
            raise reply
        replies[different[index]] = reply
        on_event(Event(stage, count, len(different), "answers"))
    return [replies[prompt] for prompt in prompts]


class _Judge:
    """One judge over many requests: it lives across calls, since failures in a row end the questions."""

    def __init__(self, endpoint: Endpoint, sleep: Callable[[float], None]) -> None:
        self.endpoint, self.sleep = endpoint, sleep
        self.lock = threading.Lock()
        self.failed_in_a_row = 0
        self.down = ""  # why nothing more is sent

    def reply(self, prompt: str) -> Reply:
        """The answer to one prompt, after as many tries as it takes."""
        problem = ""
        for wait in self.waits():
            if wait:
                self.sleep(wait)
            if self.down:
                return Reply(None, self.down)
            try:
                text = request(self.endpoint, prompt)
            except _Failure as failure:
                problem = str(failure)
                if failure.final:
                    self.down = problem
                if not failure.again:
                    break
                if failure.wait:
                    self.sleep(min(failure.wait, LONGEST_WAIT))
                continue
            with self.lock:
                self.failed_in_a_row = 0
            return Reply(text)
        with self.lock:
            self.failed_in_a_row += 1
            if self.failed_in_a_row >= GIVE_UP and not self.down:
                self.down = problem
        return Reply(None, problem)

    def waits(self) -> Iterator[float]:
        """The seconds before each try."""
        yield 0.0
        for attempt in range(self.endpoint.attempts - 1):
            yield min(self.endpoint.backoff * 2**attempt, LONGEST_WAIT)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: the key would go to another server."""

    def redirect_request(self, *_: Any) -> None:
        """No request follows."""
        return None


def request(endpoint: Endpoint, prompt: str) -> str:
    """One request of a chat completion, one try. Raises _Failure."""
    body: dict[str, Any] = {"model": endpoint.model, "messages": [{"role": "user", "content": prompt}]}
    body[endpoint.token_field] = endpoint.max_tokens
    if endpoint.temperature is not None:
        body["temperature"] = endpoint.temperature
    headers = {"Content-Type": "application/json", "User-Agent": "steer"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    sent = urllib.request.Request(f"{endpoint.url}/chat/completions", json.dumps(body).encode(), headers, method="POST")
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if urlsplit(endpoint.url).hostname in ("localhost", "127.0.0.1", "::1"):
        handlers.append(urllib.request.ProxyHandler({}))  # a proxy has another loopback
    try:
        with urllib.request.build_opener(*handlers).open(sent, timeout=endpoint.timeout) as answer:
            content = _read(answer, endpoint.timeout)
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(error, endpoint.key) from error
    except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or error
        raise _Failure(
            f"the judge can't be reached: {cut(str(reason) or type(reason).__name__, 200)}", again=True
        ) from error
    except ValueError as error:  # of a header, whose text would hold the key
        raise _Failure(f"the request to the judge can't be sent: {type(error).__name__}", final=True) from None
    return _content(content)


def _read(answer: HTTPResponse, timeout: float) -> bytes:
    """The whole body: each of its pieces may come in time, and all together not. Raises TimeoutError."""
    deadline, content = time.monotonic() + timeout, bytearray()
    while (piece := answer.read1(65_536)) and len(content) <= LARGEST:
        content += piece
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    return bytes(content)


def _refused(error: urllib.error.HTTPError, key: str) -> _Failure:
    """The failure for an answer that is no success."""
    try:
        detail = " ".join(error.read(2000).decode("utf-8", "replace").split())
    except (OSError, HTTPException):
        detail = ""
    if key:  # some servers quote it
        detail = detail.replace(key, "(the key)")
    problem = f"the judge answers with HTTP {error.code}{f': {cut(detail, 200)}' if detail else ''}"
    try:
        wait = float(error.headers.get("Retry-After", "0"))
    except ValueError:  # a date
        wait = 0.0
    return _Failure(problem, again=error.code in AGAIN, wait=max(wait, 0.0), final=error.code in REFUSED)


def _content(content: bytes) -> str:
    """The text of a chat completion's first choice; empty where the message has none. Raises _Failure."""
    if len(content) > LARGEST:
        raise _Failure(f"the judge's answer is longer than {LARGEST:,} bytes")
    try:
        value = json_text.parse(content)
        text = value["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise _Failure("the judge's answer is not a chat completion") from error
    return text if isinstance(text, str) else ""
