"""HTTP without a server: what a request becomes, and what is put into an answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import fakes
import hypothesis.strategies as st
import pytest
from hypothesis import given
from starlette.routing import Route

from steer.serving.engine import receipts
from steer.serving.engine.admission import Admission
from steer.serving.http.bodies import Limits
from steer.serving.http.fields import Serving
from steer.serving.http.middleware import Middleware
from steer.serving.http.routes import KINDS, STEERED
from steer.serving.settings import Settings
from vectors.expression import parse

VECTORS = fakes.vectors()
ARMS = {"friendly": parse("2*warm")}
LIMITS = Limits(50_000, 1000)
JSON, STREAM = b"application/json", b"text/event-stream; charset=utf-8"


def receipt(response: int = 4) -> dict[str, Any]:
    terms = [{"term": "2*warm", "vector": "warm", "prompt_tokens": 3, "response_tokens": response}]
    counts = {"prompt_tokens": 3, "cached_tokens": 0, "response_tokens": response}
    return {"digest": "sha256:1", "expression": "2*warm", **counts, "terms": terms}


async def nobody(request: Any) -> Any:
    raise AssertionError("the middleware matches routes; the stand-in answers")


ROUTES = [Route(path, nobody, methods=[method]) for method, path in KINDS if method in ("GET", "POST", "DELETE")]
ROUTES += [Route(path, nobody, methods=["POST"]) for path in ("/a/route/of/tomorrow", "/new")]


class Server:
    """What stands behind the middleware: it sees the request, runs `requests` engine requests and sends `parts`."""

    def __init__(self, parts: list[bytes], kind: bytes = JSON, status: int = 200, requests: tuple[str, ...] = ("r",)):
        self.parts, self.kind, self.status, self.requests = parts, kind, status, requests
        self.body: Any = None
        self.headers: dict[bytes, bytes] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.body, self.headers = (await receive())["body"], dict(scope["headers"])
        sheet = receipts.current()
        for name in self.requests:
            if sheet is not None:
                sheet.expect(name)
                sheet.add(name, receipt())
        headers = [(b"content-type", self.kind), (b"content-length", b"%d" % len(b"".join(self.parts)))]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for i, part in enumerate(self.parts):
            await send({"type": "http.response.body", "body": part, "more_body": i < len(self.parts) - 1})


def ask(
    server: Server, body: Any, path: str = "/v1/chat/completions", method: str = "POST"
) -> tuple[int, dict[bytes, bytes], bytes]:
    """Send a request through the middleware, its body in two parts; returns status, headers and body."""
    admission = Admission(Settings(VECTORS, ARMS), fakes.HIDDEN, fakes.LAYERS, None)
    served = {"model", "with:colon", "adapter"}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    incoming = [
        {"type": "http.request", "body": content[:5], "more_body": True},
        {"type": "http.request", "body": content[5:], "more_body": False},
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [(b"content-length", b"%d" % len(content))]}
    receipts._CURRENT.set(None)
    middleware = Middleware(server, lambda: Serving(admission, served.__contains__, LIMITS), lambda: ROUTES)
    asyncio.run(middleware(scope, receive, send))
    head, *rest = sent
    return head["status"], dict(head["headers"]), b"".join(part["body"] for part in rest)


def answer(**more: Any) -> list[bytes]:
    return [json.dumps({"model": "model", "choices": [{"finish_reason": "stop"}], **more}).encode()]


def test_an_arm_reaches_vllm_as_an_expression_and_the_answer_names_the_arm() -> None:
    server = Server(answer())
    status, headers, body = ask(server, {"model": "model:friendly", "messages": [], "vllm_xargs": {"other": 1}})
    assert json.loads(server.body) == {
        "model": "model",
        "messages": [],
        "vllm_xargs": {"other": 1, "steer": "2*warm"},
    }
    assert server.headers[b"content-length"] == b"%d" % len(server.body)
    value = json.loads(body)
    assert (status, value["model"], value["steer"]["arm"], value["steer"]["response_tokens"]) == (
        200,
        "model:friendly",
        "friendly",
        4,
    )
    assert (headers[b"x-steer-arm"], headers[b"content-length"]) == (b"friendly", b"%d" % len(body))
    assert headers[b"x-steer-digest"].startswith(b"sha256:")


@pytest.mark.parametrize("model", ["adapter:friendly", "with:colon:friendly"])
def test_an_arm_of_an_adapter_or_of_a_model_with_a_colon(model: str) -> None:
    server = Server(answer())
    ask(server, {"model": model})
    assert json.loads(server.body)["model"] == model.removesuffix(":friendly")


def test_what_is_not_steered_passes_to_the_byte() -> None:
    for body in (
        b'{"model": "model",  "x": 1}',
        b"no json",
        b"[1]",
        b'{"model": "with:colon"}',
        b'{"model": "no:arm"}',
    ):
        server = Server([b'{"a":', b' "model"}'])
        status, headers, found = ask(server, body)
        assert (status, server.body, found) == (200, body, b'{"a": "model"}')
        assert b"x-steer-digest" not in headers
    assert receipts.current() is None


@pytest.mark.parametrize(("path", "method"), [("/v1/embeddings", "POST"), ("/v1/chat/completions", "GET")])
def test_other_requests_are_not_read(path: str, method: str) -> None:
    server = Server([b"{}"])
    assert ask(server, {"vllm_xargs": {"steer": "nobody"}}, path, method)[0] == 200
    assert server.body == json.dumps({"vllm_xargs": {"steer": "nobody"}}).encode()[:5], "the first part, as it came"


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"model": "model:unfriendly"}, 404, "arms: model:friendly"),
        ({"model": "model:friendly", "vllm_xargs": {"steer": "warm"}}, 400, "give one"),
        ({"model": "model", "vllm_xargs": {"steer": "2*nobody"}}, 400, "no vector is called 'nobody'"),
        ({"model": "model", "vllm_xargs": {"steer": ["warm"]}}, 400, "not an expression"),
        ({"model": "model", "vllm_xargs": {"steer_resolved": 1}}, 400, "can't be set by a client"),
        ({"model": "model:friendly", "use_beam_search": True}, 400, "beam search can't be steered"),
        ({"model": "model:friendly", "use_beam_search": "on"}, 400, "beam search can't be steered"),
        ({"model": "model", "vllm_xargs": {"stear": "warm"}}, 400, "'vllm_xargs.stear' would be ignored"),
        ({"model": "model", "vllm_xargs": {"steer": "warm", "Steering": 1}}, 400, "'vllm_xargs.Steering' would be"),
        (
            {"model": "model:friendly", "vllm_xargs": {"stear": "warm"}},
            400,
            'write {"vllm_xargs": {"steer": "0.8*warm"}}',
        ),
        ({"model": "model", "steer": "warm"}, 400, "'steer' would be ignored"),
        ({"model": "model", "steering": None}, 400, "'steering' would be ignored"),
        (
            {"model": "model", "extra_body": {"vllm_xargs": {"steer": "warm"}}},
            400,
            "'extra_body.vllm_xargs.steer' would",
        ),
        ({"model": "model", "vllm_xarg": {"steer": "warm"}}, 400, "'vllm_xarg.steer' would be ignored"),
        ({"model": "model", "sampling_params": {"steer": "warm"}}, 400, "'sampling_params.steer' would be ignored"),
    ],
)
def test_refusals_reach_no_engine(body: Any, status: int, reason: str) -> None:
    server = Server(answer())
    found, headers, content = ask(server, body)
    assert (found, server.body) == (status, None)
    error = json.loads(content)["error"]
    assert reason in error["message"]
    assert error["code"] == status
    assert headers[b"content-length"] == b"%d" % len(content)


@pytest.mark.parametrize("value", [False, 0, "false", "Off", "n", "no boolean", [], None])
def test_what_vllm_does_not_take_for_beam_search_is_steered(value: Any) -> None:
    server = Server(answer())
    assert ask(server, {"model": "model:friendly", "use_beam_search": value})[0] == 200
    assert json.loads(server.body)["vllm_xargs"] == {"steer": "2*warm"}


JSON_VALUES = [
    None,
    [],
    ["steer"],
    "",
    "text",
    0,
    5,
    1.5,
    False,
    True,
    {},
    {"steer": None},
    {"steer": 5},
    {"steer": {}},
]
PATHS = [*STEERED, "/invocations", "/v1/chat/completions/batch", "/a/route/of/tomorrow"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", ["vllm_xargs", "model", "use_beam_search", "whole"])
@pytest.mark.parametrize("value", JSON_VALUES, ids=repr)
def test_whatever_json_a_field_holds_it_is_an_answer_or_a_refusal(path: str, field: str, value: Any) -> None:
    for model in ("model", "model:friendly"):
        body: Any = {"model": model, "messages": []}
        body = value if field == "whole" else {**body, field: value}
        status, _, content = ask(Server(answer()), body, path)
        assert status in (200, 400), content
        if status == 400:
            error = json.loads(content)["error"]
            assert {"message", "type", "param", "code"} <= error.keys()
        asks_for_an_arm = field == "vllm_xargs" and model != "model"
        if asks_for_an_arm and not (value is None or isinstance(value, dict)):
            reason = "not an object" if path in STEERED else "can't be steered"
            assert (status, reason in json.loads(content)["error"]["message"]) == (400, True)


@pytest.mark.parametrize("path", ["/invocations", "/inference/v1/generate", "/v1/audio/transcriptions", "/new"])
@pytest.mark.parametrize(
    "body",
    [
        {"model": "model:friendly"},
        {"model": "model", "vllm_xargs": {"steer": "warm"}},
        {"model": "model", "vllm_xargs": '{"steer": "warm"}'},
    ],
)
def test_a_route_that_is_not_known_fails_closed(path: str, body: Any) -> None:
    server = Server(answer())
    status, _, content = ask(server, body, path)
    assert (status, server.body) == (400, None)
    assert "can't be steered" in json.loads(content)["error"]["message"]
    assert ask(server, {"model": "model"}, path)[0] == 200


def test_a_client_that_hangs_up_leaves_no_traceback() -> None:
    status, _, body = ask(Server([b"null"], requests=()), {"model": "model:friendly"})
    assert (status, body) == (200, b"null")
    server = Server(answer())

    async def run() -> None:
        async def gone() -> Any:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            raise AssertionError(message)

        admission = Admission(Settings(VECTORS, ARMS), fakes.HIDDEN, fakes.LAYERS, None)
        scope = {"type": "http", "method": "POST", "path": STEERED[0], "headers": []}
        serving = Serving(admission, {"model"}.__contains__, LIMITS)
        await Middleware(server, lambda: serving, lambda: ROUTES)(scope, gone, send)

    asyncio.run(run())
    assert server.body is None


@pytest.mark.parametrize("path", ["/v1/chat/completions/batch", "/cohere/v2/chat"])
def test_where_vllm_drops_the_expression_it_is_refused(path: str) -> None:
    server = Server(answer())
    assert ask(server, {"model": "model"}, path)[0] == 200
    server.body = None
    found, _, content = ask(server, {"model": "model:friendly"}, path)
    assert (found, server.body) == (400, None)
    assert f"{path} can't be steered" in json.loads(content)["error"]["message"]


def test_an_answer_that_no_steered_request_made_is_withheld() -> None:
    status, _, body = ask(Server(answer(), requests=()), {"model": "model:friendly"})
    assert (status, "withheld" in json.loads(body)["error"]["message"]) == (500, True)
    stream = [b'data: {"model":"model","choices":[{"finish_reason":"stop"}]}\n\n', b"data: [DONE]\n\n"]
    _, _, body = ask(Server(stream, STREAM, requests=()), {"model": "model:friendly"})
    assert b"withheld" in body
    assert b"finish_reason" not in body


def test_a_response_that_is_asked_for_later_has_no_receipt_yet() -> None:
    server = Server([b'{"model":"model","status":"queued"}'], requests=())
    status, _, body = ask(server, {"model": "model:friendly"}, "/v1/responses")
    assert (status, json.loads(body)["steer"]) == (200, None)


def test_an_error_of_vllm_s_passes() -> None:
    status, headers, body = ask(Server([b'{"error": "model"}'], status=400, requests=()), {"model": "model:friendly"})
    assert (status, body) == (400, b'{"error": "model"}')
    assert b"x-steer-digest" not in headers


def chunk(text: str, reason: str | None = None, index: int = 0) -> bytes:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": reason}
    return b"data: " + json.dumps({"model": "model", "choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


def events(body: bytes) -> list[Any]:
    lines = [event.partition(b"data: ")[2] for event in body.split(b"\n\n") if event]
    return [line.decode() if line == b"[DONE]" else json.loads(line) for line in lines]


@given(st.data())
def test_however_a_stream_is_cut_each_event_comes_whole_and_the_last_has_the_receipt(data: st.DataObject) -> None:
    tricky = 'He said "finish_reason":"stop" and "model":"model"'
    whole = chunk("a") + chunk(tricky) + chunk("é☃") + chunk("", "stop") + b"data: [DONE]\n\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    _, headers, body = ask(Server(parts, STREAM), {"model": "model:friendly", "stream": True})
    assert headers[b"x-steer-digest"].startswith(b"sha256:")
    *chunks, done = events(body)
    assert done == "[DONE]"
    assert [one["choices"][0]["delta"]["content"] for one in chunks] == ["a", tricky, "é☃", ""]
    assert {one["model"] for one in chunks} == {"model:friendly"}
    assert ["steer" in one for one in chunks] == [False, False, False, True]


def test_of_several_answers_the_last_one_that_ends_has_the_receipt_of_all() -> None:
    parts = [chunk("a"), chunk("b", "stop", 1), chunk("c"), chunk("", "length", 0), b"data: [DONE]\n\n"]
    _, _, body = ask(Server(parts, STREAM, requests=("r", "s")), {"model": "model:friendly"})
    found = events(body)[:-1]
    assert [one.get("steer", {}).get("answers") for one in found] == [None, None, None, 2]
    assert found[-1]["steer"]["response_tokens"] == 8


def test_a_receipt_that_comes_after_the_last_chunk_is_a_chunk_of_its_own() -> None:
    server = Server([chunk("a"), b"data: [DONE]\n\n"], STREAM)
    _, _, body = ask(server, {"model": "model:friendly"})
    assert [one if isinstance(one, str) else one.get("object") for one in events(body)] == [
        None,
        "steer.receipt",
        "[DONE]",
    ]


def test_receipts_of_several_answers_are_summed() -> None:
    sheet = receipts.HttpRequest("friendly", "2*warm", fakes.resolve("2*warm", VECTORS))
    assert sheet.total() is None
    assert not sheet.complete
    for name, tokens in (("a", 4), ("b", 6)):
        sheet.expect(name)
        sheet.add(name, receipt(tokens))
    total = sheet.total()
    assert total is not None
    assert (total["arm"], total["answers"], total["prompt_tokens"], total["response_tokens"]) == ("friendly", 2, 6, 10)
    assert total["terms"][0]["response_tokens"] == 10
    assert sheet.complete


def test_state_that_is_not_there_yet_lets_requests_pass() -> None:
    server = Server([b"{}"])

    async def run() -> None:
        async def nothing(*_: Any) -> Any:
            return {"type": "http.request", "body": b"{}"}

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await Middleware(server, lambda: None, lambda: ROUTES)(scope, nothing, nothing)

    asyncio.run(run())
    assert server.body == b"{}"
