"""No route serves a request for steering unsteered: by vLLM's own table of routes, however the path is written."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import route_trial
from starlette.applications import Starlette
from starlette.routing import Route

from steer.serving.http.middleware import Middleware
from steer.serving.http.routes import KINDS, STEERED, Kind, kind_of, route_of

# Routes that need packages or devices which are not installed with vLLM.
OPTIONAL = {("POST", "/cohere/v2/chat"), ("POST", "/start_profile"), ("POST", "/stop_profile"), ("MOUNT", "/static")}
OPTIONAL |= {("POST", "/v1/decisions")}  # of vLLM 0.33
# Pooling models are refused at the start.
OPTIONAL |= {("POST", path) for path in ("/pooling", "/classify", "/score", "/v1/score", "/v1/embeddings", "/v2/embed")}
OPTIONAL |= {("POST", path) for path in ("/rerank", "/v1/rerank", "/v2/rerank")}


def small_app(**serving: Any) -> Any:
    """An application with every route of the table and one that the table does not know."""
    methods = {"MOUNT", "WEBSOCKET"}
    routes = [Route(path, route_trial.handler, methods=[method]) for method, path in KINDS if method not in methods]
    routes.append(Route("/a/route/of/tomorrow", route_trial.handler, methods=["POST", "PUT"]))
    for route in routes:
        route.app = route_trial.stand_in(route.path)
    app = Starlette(routes=routes)
    app.add_middleware(Middleware, find=lambda: route_trial.serving(**serving), routes=lambda: app.routes)  # type: ignore[arg-type]
    return app


def require_nothing_unsteered(results: list[dict[str, Any]]) -> None:
    """Whatever reached the handler of a generating route and asked for steering was steered; the rest was refused."""
    for result in results:
        kind = KINDS.get((result["method"], result["path"]), Kind.REFUSED)
        asks = result["body"] != "plain"
        if kind is Kind.OTHER or (kind is Kind.TOKENS and result["body"] != "arm"):
            continue
        if not asks:
            assert not result["steered"], result
            continue
        if kind is Kind.STEERED and result["body"] in ("arm", "expression"):
            assert result["reached"] is result["steered"], result
            if result["form"] == "as it is" and result["method"] == "POST":
                assert result["steered"], result
        elif kind is not Kind.TOKENS:
            assert not result["reached"], result
        if not result["reached"]:
            assert result["status"] in (307, 400, 404, 405), result


@pytest.mark.parametrize("root", ["", "/prefix", "/v1", "/v"])
def test_whatever_the_path_looks_like_nothing_is_served_unsteered(root: str) -> None:
    paths = [*STEERED, "/invocations", "/inference/v1/generate", "/tokenize", "/a/route/of/tomorrow"]
    results = asyncio.run(route_trial.trial(small_app(), paths, root))
    require_nothing_unsteered(results)
    steered = [r for r in results if r["steered"]]
    assert {r["path"] for r in steered} == set(STEERED)
    assert {r["form"] for r in steered} >= {"as it is", "percent"}
    refused = [r for r in results if r["body"] == "arm" and r["path"] == "/invocations" and r["form"] == "percent"]
    assert [r["status"] for r in refused] == [400]


@pytest.mark.slow
def test_every_route_of_vllm_is_classified_and_none_serves_unsteered() -> None:
    """A route that a new version of vLLM adds fails here until `routes.KINDS` says what it does."""
    pytest.importorskip("vllm")
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), *folders]),
        "VLLM_PLUGINS": "steer",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ENABLE_COHERE_API": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    done = subprocess.run(
        [sys.executable, "-P", str(Path(route_trial.__file__))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    trials = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("TRIAL ")]
    assert len(trials) == 2, done.stderr[-3000:]
    routes = {(method, path) for trial in trials for method, path in trial["table"]}
    unclassified = routes - KINDS.keys()
    assert unclassified == set(), f"say in steer/serving/http/routes.py what these do: {sorted(unclassified)}"
    assert KINDS.keys() - routes - OPTIONAL == set(), "the table holds routes that vLLM does not have"
    for trial in trials:
        require_nothing_unsteered([r for r in trial["results"] if r["path"] != "/metrics"])  # mounted for all methods
        assert {r["path"] for r in trial["results"] if r["steered"]} == set(STEERED)


def test_an_unknown_route_counts_as_one_that_generates() -> None:
    scope = {"type": "http", "method": "POST", "path": "/new", "headers": []}
    new, old = (Route(path, route_trial.handler, methods=["POST"]) for path in ("/new", "/old"))
    assert kind_of(route_of([new], scope)) is Kind.REFUSED
    assert kind_of(route_of([old], scope)) is Kind.OTHER, "the router answers 404"


@pytest.mark.parametrize("path", ["/invocations", "/v1/audio/transcriptions", "/a/route/of/tomorrow"])
@pytest.mark.parametrize("asking", ["form", "urlencoded", "query", "header", "nested", "list"])
def test_arms_and_expressions_are_found_wherever_a_route_may_read_them(path: str, asking: str) -> None:
    app, headers, body, query = small_app(), {}, b'{"model": "model"}', ""
    if asking == "form":
        boundary = "--b\r\ncontent-disposition: form-data; name="
        text = f'{boundary}"file"; filename="a.wav"\r\n\r\nmodel:friendly\r\n'
        plain = (text + f'{boundary}"model"\r\n\r\nmodel\r\n--b--\r\n').encode()
        body = (text + f'{boundary}"vllm_xargs"\r\n\r\n{{"steer": "warm"}}\r\n--b--\r\n').encode()
        headers = {"content_type": "Multipart/Form-Data; boundary=b"}
        assert asyncio.run(route_trial.ask(app, "POST", path, plain, **headers))[0] == 200
    if asking == "urlencoded":
        body, headers = b"model=x&model=model%3Afriendly", {"content_type": "application/x-www-form-urlencoded"}
    if asking == "query":
        query = "?model=other&model=model%3Afriendly"
    if asking == "header":
        headers = {"X_Amzn_SageMaker_Adapter_Identifier": "model:friendly"}
    if asking == "nested":
        body = b'{"requests": {"all": [1, [{"model": "model:friendly"}]]}}'
    if asking == "list":
        body = b'[{"sampling_params": "{\\"steering\\": 1}"}]'
    status, content = asyncio.run(route_trial.ask(app, "POST", path + query, body, **headers))
    assert (status, b"can't be steered" in content) == (400, True), content


def test_where_vllm_checks_no_names_an_arm_of_any_name_counts() -> None:
    body = b'{"model": "whatever:friendly"}'
    ask = lambda app, path: asyncio.run(route_trial.ask(app, "POST", path, body))  # noqa: E731
    assert json.loads(ask(small_app(any_model=True), STEERED[0])[1])["steer"]["arm"] == "friendly"
    assert ask(small_app(any_model=True), "/invocations")[0] == 400
    assert "steer" not in json.loads(ask(small_app(), STEERED[0])[1]), "vLLM answers that there is no such model"


@pytest.mark.parametrize(
    ("model", "status"),
    [("llama3:8b", 200), ("a:b:c", 200), ("llama3:frendly", 404), ("llama3:FRIENDLY", 404), ("model:8b", 404)],
)
def test_where_vllm_checks_no_names_a_colon_alone_makes_no_arm(model: str, status: int) -> None:
    body = json.dumps({"model": model}).encode()
    found, content = asyncio.run(route_trial.ask(small_app(any_model=True), "POST", STEERED[0], body))
    assert found == status, content
    if status == 200:
        assert json.loads(json.loads(content)["reached"]) == {"model": model}


def test_counting_tokens_takes_an_arm_for_its_model() -> None:
    for path in ("/tokenize", "/v1/messages/count_tokens"):
        status, content = asyncio.run(
            route_trial.ask(small_app(), "POST", path, b'{"model": "model:friendly", "prompt": "\\u00e9"}')
        )
        assert (status, json.loads(json.loads(content)["reached"])) == (200, {"model": "model", "prompt": "é"})


@pytest.mark.parametrize(
    ("texts", "query", "closed"),
    [
        (['{"type": "session.update", "model": "model"}', "no json"], b"", False),
        (['{"type": "session.update", "model": "model:friendly"}'], b"", True),
        (['{"session": {"model": "model:friendly"}}'], b"", True),
        (['{"vllm_xargs": {"steer": "warm"}}'], b"", True),
        ([], b"model=model:friendly", True),
    ],
)
def test_a_web_socket_that_asks_for_steering_is_closed(texts: list[str], query: bytes, closed: bool) -> None:
    from starlette.routing import WebSocketRoute

    sent: list[Any] = []
    incoming: list[Any] = [{"type": "websocket.receive", "text": text} for text in texts]
    incoming.append({"type": "websocket.disconnect", "code": 1000})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass

    async def receive() -> Any:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    routes = [WebSocketRoute("/v1/realtime", route_trial.handler)]
    scope = {"type": "websocket", "path": "/v1/realtime", "query_string": query, "headers": []}
    asyncio.run(Middleware(app, route_trial.serving, lambda: routes)(scope, receive, send))
    assert any(m["type"] == "websocket.close" and m["code"] == 1008 for m in sent) is closed
