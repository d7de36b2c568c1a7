"""The size of a request's body is bounded on every route, before it is parsed, and the connection stays usable."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fakes
import pytest
import route_trial
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Route

from steer.serving.engine import frontend_hooks
from steer.serving.engine.admission import Admission
from steer.serving.http import bodies, endpoints
from steer.serving.http.endpoints import Endpoints
from steer.serving.http.middleware import Middleware
from steer.serving.http.routes import KINDS, STEERED, Kind
from steer.serving.settings import Settings

LIMIT, CONTAINERS = route_trial.LIMITS
OURS = ["/v1/feedback", "/steer/arms", "/steer/vectors?name=warm"]
PATHS = [*STEERED, "/invocations", "/tokenize", "/v1/embeddings", "/v1/load_lora_adapter", "/a/route/of/tomorrow"]
ROUTES = [
    Route(path, route_trial.handler, methods=["POST"])
    for path in (*PATHS, "/steer/vectors", "/v1/audio/transcriptions")
]
for route in ROUTES:
    route.app = route_trial.handler


def app() -> Any:
    """An application with a route of each kind behind the middleware."""
    built = Starlette(routes=ROUTES)
    built.add_middleware(Middleware, find=route_trial.serving, routes=lambda: ROUTES)  # type: ignore[arg-type]
    return built


def send_in_parts(path: str, parts: int, size: int, announced: int | None) -> tuple[int, int, dict[str, Any] | None]:
    """Send zeros in parts; the status, how many parts were read, and the error of the answer."""
    headers = [(b"content-type", b"application/json")]
    headers.append((b"transfer-encoding", b"chunked") if announced is None else (b"content-length", b"%d" % announced))
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    read, sent = 0, []

    async def receive() -> Any:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": bytes(size), "more_body": read < parts}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app()(scope, receive, send))
    return sent[0]["status"], read, json.loads(sent[1]["body"]).get("error")


@pytest.mark.parametrize("path", PATHS)
def test_an_announced_body_that_is_too_large_is_refused_unread_and_the_setting_is_named(path: str) -> None:
    status, read, error = send_in_parts(path, 1000, 65_536, LIMIT + 1)
    assert (status, read) == (413, 0)
    assert error is not None
    assert error["code"] == 413
    assert f"the body has {LIMIT + 1} bytes, and this server takes at most {LIMIT};" in error["message"]
    assert "--max-body" in error["message"]
    assert send_in_parts(path, 1000, 65_536, 10**30)[:2] == (413, 0)


# Where a length is announced, routes that generate nothing get the body unread; the server ends it at that length.
@pytest.mark.parametrize(
    ("path", "announced"),
    [*((path, None) for path in PATHS), *((path, 5) for path in PATHS if KINDS.get(("POST", path)) is not Kind.OTHER)],
)
def test_of_a_body_without_a_true_length_no_more_is_read_than_the_limit(path: str, announced: int | None) -> None:
    status, read, error = send_in_parts(path, 1000, 65_536, announced)
    assert (status, read) == (413, LIMIT // 65_536 + 1)
    assert error is not None
    assert f"more than {LIMIT} bytes" in error["message"]


@pytest.mark.parametrize("path", PATHS)
def test_a_body_of_the_limit_is_taken(path: str) -> None:
    for announced in (None, LIMIT):
        status, read, _ = send_in_parts(path, LIMIT // 65_536, 65_536, announced)
        assert (status, read) == (200, LIMIT // 65_536)


def test_the_routes_of_steer_have_limits_of_their_own() -> None:
    assert send_in_parts("/steer/vectors", 20, 65_536, None)[:2] == (200, 20)


def test_the_default_follows_from_the_context_and_leaves_room_for_images() -> None:
    assert bodies.limits(None, 1024, media=False) == (1 << 20, 10_000)
    assert bodies.limits(None, 131_072, media=False) == (4 << 20, 65_536)
    assert bodies.limits(None, 1_000_000, media=False) == (32_000_000, 500_000)
    assert bodies.limits(None, 8192, media=True) == (64 << 20, 10_000)
    assert bodies.limits(5000, 8192, media=True) == (5000, 10_000)


def post(path: str, body: bytes, kind: str = "application/json") -> tuple[int, bytes]:
    return asyncio.run(route_trial.ask(app(), "POST", path, body, content_type=kind))


@pytest.mark.parametrize("path", [*STEERED, "/invocations", "/tokenize"])
@pytest.mark.parametrize("item", [b"[]", b"{}", b'["\\""]', b'{"[": 1}'])
def test_more_lists_and_objects_than_a_chat_has_are_not_parsed(path: str, item: bytes) -> None:
    """Each of them is an invalid message, for which vLLM would make eight errors of a kilobyte."""
    many, few = (b'{"messages": [' + b",".join([item] * count) + b"]}" for count in (CONTAINERS, CONTAINERS - 2))
    status, content = post(path, many)
    message = f"the body holds {CONTAINERS + 2} lists and objects, and this server takes at most {CONTAINERS};"
    assert (status, message in json.loads(content)["error"]["message"]) == (413, True)
    assert post(path, few)[0] == 200


@pytest.mark.parametrize(
    "text", [b"[" * 50_000, b'\\"[{' * 20_000, b"\\\\{[" * 20_000, b'\\\\\\"{[' * 20_000], ids=range(4)
)
def test_brackets_in_a_text_do_not_count(text: bytes) -> None:
    body = b'{"model": "model", "prompt": "' + text + b'"}'
    assert json.loads(body)["prompt"] == json.loads(b'"' + text + b'"')
    assert post(STEERED[1], body) == (
        200,
        json.dumps({"reached": body.decode(), "route": ""}, separators=(",", ":")).encode(),
    )


@pytest.mark.parametrize("end", [b"", b"\\"])
def test_a_string_without_an_end_is_read_once(end: bytes) -> None:
    """Twice as long takes twice as long, not four times: each quotation mark in it could begin a string."""
    body = b"[" * 20_000 + b'"' + b'\\"' * 400_000 + end
    with pytest.raises(bodies.TooLarge, match="holds 20000 lists"):
        bodies.require_few_containers(body, CONTAINERS)


def test_a_form_may_hold_any_bytes() -> None:
    assert post("/v1/audio/transcriptions", b"--x\r\n" + b"[{" * 20_000, "Multipart/Form-Data; boundary=x")[0] == 200
    for kind in ("application/json; form=x", "text/multipart/form-data", ""):
        assert post(STEERED[0], b"[{" * 20_000, kind)[0] == 413


@contextlib.contextmanager
def server_of(served: Any, parser: str) -> Iterator[int]:
    """The port of a real server of an application, with a parser of HTTP that it may use."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip(parser)
    server = uvicorn.Server(uvicorn.Config(served, port=0, http=parser, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module", params=["httptools", "h11"])
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """A real server, with each parser of HTTP that it may use."""
    with server_of(app(), request.param) as port:
        yield port


@pytest.fixture(scope="module", params=["httptools", "h11"])
def ours(request: pytest.FixtureRequest) -> Iterator[int]:
    """A real server of the routes of steer."""
    made = Endpoints()
    admission = Admission(Settings({}, {}), fakes.HIDDEN, fakes.LAYERS, None)
    made.engine = SimpleNamespace(input_processor=SimpleNamespace(model_config=None))
    made.experiments["tone"] = SimpleNamespace()  # type: ignore[assignment]
    application = FastAPI()
    application.state.args = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontend_hooks, "admission_of", lambda processor: admission)
        patch.setattr(endpoints, "_authorisation", lambda arguments: lambda headers: True)
        patch.setattr(Endpoints, "_find", lambda self: None)
        made.attach_router(application)
        with server_of(application, request.param) as port:
            yield port


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("path", [STEERED[0], "/invocations", "/v1/embeddings"])
def test_the_connection_goes_on_after_a_refusal(port: int, path: str, announced: bool) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.connect()
    first = connection.sock
    large: Any = bytes(8 * LIMIT) if announced else iter([bytes(65_536)] * 128)
    for _ in range(2):
        connection.request("POST", path, large, encode_chunked=not announced)
        answer = connection.getresponse()
        assert (answer.status, b"--max-body" in answer.read()) == (413, True)
        connection.request("POST", path, b'{"model": "model"}', {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["reached"]) == (200, '{"model": "model"}')
        large = bytes(2 * LIMIT)
        announced = True
    assert connection.sock is first, "the same connection"
    connection.close()


def announce(port: int, path: str, **headers: str) -> http.client.HTTPResponse:
    """The answer to a request of which no more than its head is sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest("POST", path)
    for name, value in {"Content-Length": str(2 * LIMIT), **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    return connection.getresponse()


def test_a_client_that_waits_before_it_sends_is_refused_and_the_connection_ends(port: int) -> None:
    answer = announce(port, STEERED[0], Expect="100-continue")
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    answer.close()


@pytest.mark.parametrize("path", OURS)
def test_the_routes_of_steer_refuse_what_is_announced_as_too_large_before_it_is_sent(ours: int, path: str) -> None:
    answer = announce(ours, path)
    error = json.loads(answer.read())["error"]
    assert (answer.status, error["code"], error["type"]) == (413, 413, "RequestTooLargeError")
    assert f"the body has {2 * LIMIT} bytes, and this server takes at most" in error["message"]
    answer = announce(ours, path, Expect="100-continue")
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    answer.close()


@pytest.mark.parametrize("path", OURS)
def test_the_routes_of_steer_refuse_a_body_without_a_length_while_it_comes_and_the_connection_goes_on(
    ours: int, path: str
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", ours, timeout=30)
    connection.connect()
    first, sent = connection.sock, 0

    def parts() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(64):
            sent += 1
            yield bytes(65_536)

    connection.request("POST", path, parts(), encode_chunked=True)
    answer = connection.getresponse()
    assert (answer.status, b"more than" in answer.read(), sent) == (413, True, 64)
    connection.request("POST", path, b"{", {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert (answer.status, connection.sock is first, bool(answer.read())) == (400, True, True)
    connection.close()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("form", [False, True])
def test_lists_count_in_every_encoding_in_which_json_is_read_and_in_a_form_that_is_json(
    encoding: str, form: bool
) -> None:
    text = json.dumps({"x": '"', "messages": [[]] * 200})
    with pytest.raises(bodies.TooLarge, match="holds 202 lists and objects"):
        bodies.require_few_containers(text.encode(encoding), 100, form=form)
    bodies.require_few_containers(text.encode(encoding), 202, form=form)
    bodies.require_few_containers(b"--boundary\r\n" + b"[" * 200, 100, form=True)
