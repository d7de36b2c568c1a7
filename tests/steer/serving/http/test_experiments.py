"""Requests of an experiment without a server: which arm they get, what vLLM is sent, what is recorded and said."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakes
import pytest
from starlette.routing import Route

from steer.experiments import document, exports
from steer.experiments import feedback as given_feedback
from steer.experiments.assignment import hashed
from steer.experiments.overview import overview
from steer.experiments.running import live
from steer.experiments.running.live import Live
from steer.experiments.running.measures import repetition
from steer.experiments.specification import Metric
from steer.experiments.storage import epochs
from steer.serving.engine import frontend_hooks, receipts
from steer.serving.engine.admission import Admission
from steer.serving.http import bodies, experiments, feedback
from steer.serving.http.bodies import Limits
from steer.serving.http.fields import Serving
from steer.serving.http.measured import brings_tokens, renamed
from steer.serving.http.middleware import Middleware
from steer.serving.http.routes import KINDS
from steer.serving.settings import Settings

JSON, STREAM = b"application/json", b"text/event-stream; charset=utf-8"
CHAT = "/v1/chat/completions"
ARMS = {"control": {}, "friendly": {"steer": "2*warm"}, "prompt": {"system": "Be warm."}}
HEADERS = dict[str, str]


async def nobody(request: Any) -> Any:
    raise AssertionError("the middleware matches routes; the stand-in answers")


ROUTES = [Route(path, nobody, methods=[method]) for method, path in KINDS if method in ("GET", "POST", "DELETE")]


class Served:
    """An experiment behind the middleware, and what stands in for vLLM behind it."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.vectors = fakes.vectors()
        self.vectors["warm"].save(folder / "warm.safetensors")
        values = {"name": "tone", "salt": "salt", "arms": ARMS, "metric": {"name": "thumbs"}, "unit": "user"}
        (folder / "tone.yaml").write_text(json.dumps({**values, **changes}))
        self.live: Live = live.begin(document.read(folder / "tone.yaml"))
        self.folder = folder
        self.body: Any = None
        self.parts: list[bytes] = []
        self.kind, self.status = JSON, 200
        self.raises: BaseException | None = None
        self.refuses = False  # whether the engine refuses to steer
        self.leaves: int | None = None  # the part before which the client goes away

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.body = json.loads((await receive())["body"])
        sheet = receipts.current()
        if sheet is not None and self.refuses:
            frontend_hooks._invalid("a request with streaming input can't be steered")
        elif sheet is not None:
            sheet.expect("r")
            counts = {"prompt_tokens": 3, "cached_tokens": 0, "response_tokens": 4}
            sheet.add("r", {"digest": sheet.resolved.key, "expression": "2*warm", **counts, "terms": []})
        if self.raises is not None:
            raise self.raises
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"content-type", self.kind)]})
        for i, part in enumerate(self.parts):
            if i == self.leaves:
                raise asyncio.CancelledError
            await send({"type": "http.response.body", "body": part, "more_body": i < len(self.parts) - 1})

    def ask(self, body: Any, path: str = CHAT, **headers: str) -> tuple[int, HEADERS, bytes]:
        """Send a request; headers are written with _ for -."""
        if not self.parts:
            self.parts = [answer()]
        incoming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            return incoming.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        admission = Admission(Settings(self.vectors, {}), fakes.HIDDEN, fakes.LAYERS, None)
        lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": lines}
        serving = Serving(
            admission,
            {"model", "other"}.__contains__,
            Limits(50_000, 1000),
            base="model",
            names=["model", "other"],
            experiments={"tone": self.live},
        )
        receipts._CURRENT.set(None)
        asyncio.run(Middleware(self, lambda: serving, lambda: ROUTES)(scope, receive, send))
        head, *rest = sent
        names = {name.decode(): value.decode() for name, value in head["headers"]}
        return head["status"], names, b"".join(part["body"] for part in rest)

    def chat(self, user: str = "ann", **more: Any) -> tuple[int, HEADERS, bytes]:
        return self.ask(chat(user), **more)

    def rows(self, table: str = "exposures") -> list[dict[str, Any]]:
        assert self.live.writer.flush(10)
        with sqlite3.connect(self.folder / "tone.db") as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY at")]

    def say(self, body: Any) -> tuple[int, dict[str, Any]]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def receive() -> Any:
            return {"type": "http.request", "body": content, "more_body": False}

        return asyncio.run(feedback.receive({"headers": []}, receive, {"tone": self.live}))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    running = Served(tmp_path)
    yield running
    running.live.end()


def chat(user: str = "ann", text: str = "Hello", **more: Any) -> dict[str, Any]:
    return {"model": "tone", "user": user, "messages": [{"role": "user", "content": text}], **more}


def answer(text: str = "Hi there", **more: Any) -> bytes:
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    return json.dumps({"id": "chat-1", "model": "model", "choices": [choice], "usage": usage, **more}).encode()


def events(*values: Any) -> list[bytes]:
    return [b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n" for value in values]


def test_arms_reach_vllm_as_what_they_do(served: Served) -> None:
    bodies = {}
    for arm in ARMS:
        status, headers, _ = served.chat(x_steer_arm=arm)
        assert (status, headers["x-steer-arm"], headers["x-steer-unit"]) == (200, f"tone:{arm}", "user; forced")
        bodies[arm] = served.body
    plain = {**chat(), "model": "model"}
    assert bodies["control"] == plain
    assert bodies["friendly"] == {**plain, "vllm_xargs": {"steer": "2*warm"}}
    assert bodies["prompt"] == {**plain, "messages": [{"role": "system", "content": "Be warm."}, *plain["messages"]]}


def test_an_answer_names_what_the_client_called_and_is_one_row(served: Served) -> None:
    _, headers, body = served.chat()
    value = json.loads(body)
    assert (value["model"], headers["x-steer-experiment"]) == ("tone", "tone; version=1")
    (row,) = served.rows()
    assert row["arm"] == headers["x-steer-arm"].removeprefix("tone:")
    expected = {"status": 200, "response": "chat-1", "prompt_tokens": 3, "response_tokens": 5, "stop": "stop",
                "characters": 8, "reason": "assigned", "unit_source": "user", "counted": 1, "refusal": 0}  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    assert row["prompt"] is row["answer"] is row["ttft"] is None
    assert row["latency"] > 0
    assert "ann" not in json.dumps(row)


@pytest.mark.parametrize(
    ("more", "same"),
    [({}, True), ({"note": 'a "model": b'}, True), ({"inner": {"model": "model"}}, False), ({"model": "other"}, True)],
)
def test_an_answer_gets_the_called_name_and_nothing_else_changes(more: dict[str, Any], same: bool) -> None:
    value = {"id": "é\u2028", "x": 1e-7, "model": 'a "b"', **more}
    body = json.dumps(value, separators=(",", ":")).encode()
    for served in (value["model"], "model"):
        found = renamed(body, value, served, "töne")
        assert json.loads(found) == {**value, "model": "töne"}
        if same and served == value["model"]:  # to the byte: numbers and escapes too
            assert found == body.replace(json.dumps(served).encode(), json.dumps("töne").encode())


def test_the_receipt_decides_the_composition_and_all_arms_count_tokens_alike(served: Served) -> None:
    served.chat(x_steer_arm="friendly")
    served.chat(x_steer_arm="control")
    steered, control = served.rows()
    arm = served.live.experiment.arm("friendly")
    assert arm is not None
    assert (steered["composition"], control["composition"]) == (arm.composition, None)
    assert steered["response_tokens"] == control["response_tokens"] == 5  # the receipt says 4


def test_a_stream_is_measured_and_the_counts_that_only_we_asked_for_are_left_out(served: Served) -> None:
    served.kind = STREAM
    chunks = events(
        {"id": "chat-2", "model": "model", "choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"id": "chat-2", "model": "model", "choices": [{"delta": {"content": 'a "model":"model" b'}}]},
        {"id": "chat-2", "model": "model", "choices": [{"delta": {"content": ""}, "finish_reason": "length"}]},
        {"id": "chat-2", "model": "model", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
    )
    whole = b"".join([*chunks, b"data: [DONE]\n\n"])
    served.parts = [whole[i : i + 37] for i in range(0, len(whole), 37)]
    _, _, body = served.ask(chat(stream=True), x_steer_arm="control")
    assert served.body["stream_options"] == {"include_usage": True}
    assert (body.count(b'"model":"tone"'), b"usage" in body, body[-14:]) == (3, False, b"data: [DONE]\n\n")
    served.ask(chat(stream=True, stream_options={"include_usage": True}), x_steer_arm="control")
    ours, theirs = served.rows()
    for row in (ours, theirs):
        assert (row["response"], row["response_tokens"], row["stop"]) == ("chat-2", 2, "length")
        assert row["ttft"] is not None
        assert row["inter_token"] is not None
    assert ours["characters"] == len('a "model":"model" b')


ROLE = {"choices": [{"delta": {"role": "assistant"}}]}
MESSAGE = {"type": "message_start", "message": {"id": "m", "content": [], "usage": {"input_tokens": 2}}}


@pytest.mark.parametrize(
    ("begin", "tokens"),
    [
        (ROLE, [{"choices": [{"delta": {"reasoning": text}}]} for text in ("I", " think")]),
        (ROLE, [{"choices": [{"delta": {"reasoning_content": text}}]} for text in ("I", " think")]),
        (ROLE, [{"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]} for _ in range(2)]),
        (MESSAGE, [{"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "I"}}] * 2),
        (MESSAGE, [{"type": "content_block_start", "content_block": {"type": "tool_use", "name": "f"}},
                   {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": "{}"}}]),
        ({"type": "response.created"}, [{"type": "response.reasoning_text.delta", "delta": "I"}] * 2),
        ({"type": "response.created"}, [{"type": "response.output_item.added", "item": {"type": "function_call"}},
                                        {"type": "response.function_call_arguments.delta", "delta": "{}"}]),
    ],
)  # fmt: skip
def test_thinking_and_calls_of_tools_are_tokens_too(served: Served, begin: Any, tokens: list[Any]) -> None:
    """They are among the tokens that the client is told, so the first of them is the first."""
    rest = [{"type": "content_block_delta", "delta": {"type": "signature_delta", "signature": "s"}},
            {"choices": [], "usage": {"completion_tokens": 3}}]  # fmt: skip
    assert list(map(brings_tokens, [begin, *tokens, *rest])) == [False, True, True, False, False]
    served.kind, served.parts = STREAM, events(begin, *tokens, *rest)
    served.ask(chat(stream=True))
    (row,) = served.rows()
    assert 0 < row["ttft"] < row["latency"]
    assert 0 < row["inter_token"] < row["latency"]
    assert row["characters"] == 0


@pytest.mark.parametrize("last", [b"data: [DONE]\n\n", b'event: message_stop\ndata: {"type":"message_stop"}\n\n'])
def test_a_client_that_leaves_after_the_last_event_has_had_its_answer(served: Served, last: bytes) -> None:
    (chunk,) = events({"id": "chatcmpl-1", "choices": [{"delta": {"content": "Hi"}, "finish_reason": "stop"}]})
    served.kind, served.parts, served.leaves = STREAM, [chunk, last, b""], 2
    with contextlib.suppress(asyncio.CancelledError):
        served.ask(chat(stream=True))
    (row,) = served.rows()
    assert (row["status"], row["response"], row["stop"]) == (200, "chatcmpl-1", "stop")


def test_a_client_that_asked_for_counts_gets_them(served: Served) -> None:
    served.kind = STREAM
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    served.parts = events({"id": "c", "model": "model", "choices": [], "usage": usage})
    _, _, body = served.ask(chat(stream=True, stream_options={"include_usage": True}), x_steer_arm="control")
    assert b'"usage"' in body


@pytest.mark.parametrize(
    ("path", "body", "value"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "metadata": {"user_id": "ann"}},
         {"id": "m", "type": "message", "content": [{"type": "text", "text": "four"}], "stop_reason": "end_turn",
          "usage": {"input_tokens": 2, "output_tokens": 1}}),
        ("/v1/responses", {"input": "x", "user": "ann"},
         {"id": "r", "output": [{"type": "message", "content": [{"type": "output_text", "text": "four"}]}],
          "status": "completed", "usage": {"input_tokens": 2, "output_tokens": 1}}),
    ],
)  # fmt: skip
def test_every_route_is_measured(served: Served, path: str, body: Any, value: Any) -> None:
    served.parts = [json.dumps({"model": "model", **value}).encode()]
    served.ask({"model": "tone", **body}, path, x_steer_arm="prompt")
    assert served.body["system" if path == "/v1/messages" else "instructions"] == "Be warm."
    (row,) = served.rows()
    assert (row["response"], row["prompt_tokens"], row["response_tokens"]) == (value["id"], 2, 1)
    assert (row["characters"], row["unit_source"]) == (4, "user")


def test_a_system_prompt_stands_before_the_client_s_own(served: Served) -> None:
    messages = [{"role": "system", "content": "You sell shoes."}, {"role": "user", "content": "Hello"}]
    served.ask({"model": "tone", "messages": messages}, x_steer_arm="prompt")
    assert served.body["messages"][0]["content"] == "Be warm.\n\nYou sell shoes."
    parts = [{"type": "text", "text": "You sell shoes."}]
    served.ask({"model": "tone", "messages": [{"role": "system", "content": parts}]}, x_steer_arm="prompt")
    assert served.body["messages"][0]["content"] == [{"type": "text", "text": "Be warm."}, *parts]


def test_a_user_keeps_an_arm_and_a_conversation_too(tmp_path: Path) -> None:
    served = Served(tmp_path, unit="conversation")
    arms = set()
    for turn in range(4):
        history = [{"role": "user", "content": "Who are you?"}]
        for i in range(turn):
            history += [{"role": "assistant", "content": f"{i}"}, {"role": "user", "content": f"{i}?"}]
        _, headers, _ = served.ask({"model": "tone", "messages": [{"role": "system", "content": f"{turn}"}, *history]})
        assert headers["x-steer-unit"] == "first message; assigned"
        arms.add(headers["x-steer-arm"])
    assert len(arms) == 1
    assert len({(row["unit"], row["conversation"]) for row in served.rows()}) == 1
    named = [served.ask(chat(text=f"{i}"), x_steer_conversation="c1")[1] for i in range(12)]
    assert len({headers["x-steer-arm"] for headers in named}) == 1
    assert named[0]["x-steer-unit"] == "conversation; assigned"
    served.live.end()


def test_a_unit_may_be_a_header(tmp_path: Path) -> None:
    served = Served(tmp_path, unit={"header": "X-Session"})
    arms = {served.ask(chat(str(i), f"{i}"), x_session="s1")[1]["x-steer-arm"] for i in range(12)}
    assert len(arms) == 1
    assert served.ask(chat("x", "y"))[1]["x-steer-unit"] == "first message; assigned"
    served.live.end()


def test_an_id_in_a_header_is_the_text_that_its_owner_types(tmp_path: Path) -> None:
    served = Served(tmp_path, unit={"header": "X-User"})
    try:
        served.ask(chat("ann"), x_user="müller", x_steer_conversation="größe")
        (row,) = served.rows()
        assert row["unit"] == hashed("salt", "müller")
        assert exports.forget(served.live.engine, "tone", "salt", "müller").answers == 1
        served.parts = [answer()]
        said = {"metric": "thumbs", "value": True, "conversation_id": "größe"}
        assert served.say(said)[1]["mark"] is None
    finally:
        served.live.end()
    assert bodies.header_text({"headers": [(b"X-User", "müller".encode("latin-1"))]}, b"x-user") == "müller"


@pytest.mark.parametrize("unit", ["user", {"header": "X-Session"}])
@pytest.mark.parametrize("headers", [{}, {"x_steer_conversation": "1"}])
def test_users_who_begin_alike_or_count_their_conversations_alike_keep_arms_of_their_own(
    tmp_path: Path, unit: Any, headers: HEADERS
) -> None:
    served = Served(tmp_path, unit=unit)
    users, turns = [f"user {i}" for i in range(12)], [{"role": "user", "content": "Hi"}]
    arms: dict[str, set[str]] = {user: set() for user in users}
    for _ in range(3):
        for user in users:
            body = {"model": "tone", "user": user, "messages": turns}
            if unit != "user":
                body.pop("user")
            arms[user].add(served.ask(body, x_session=user, **headers)[1]["x-steer-arm"])
        turns = [*turns, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "More"}]
    assert {len(each) for each in arms.values()} == {1}
    assert len(set.union(*arms.values())) == 3
    assert {(row["reason"], row["counted"]) for row in served.rows()} == {("assigned", 1)}
    served.live.end()


@pytest.mark.parametrize(
    ("body", "headers", "problem"),
    [
        (chat(vllm_xargs={"steer": "warm"}), {}, "decides how its requests are steered"),
        (chat(steer="warm"), {}, "decides how its requests are steered"),
        (chat(background=True), {}, "background"),
        (chat(use_beam_search=True), {}, "beam search can't be steered"),
        (chat(vllm_xargs={"steer_resolved": {}}), {}, "decides how its requests are steered"),
        (chat(), {"x_steer_arm": "nobody"}, "has no arm 'nobody'; arms: control, friendly, prompt"),
        ({**chat(), "model": "model"}, {"x_steer_arm": "friendly"}, "and the model 'model' is none"),
    ],
)
def test_what_would_be_ignored_is_refused(served: Served, body: Any, headers: HEADERS, problem: str) -> None:
    status, _, text = served.ask(body, **headers)
    assert (status, problem in text.decode()) == (400, True)
    assert served.body is None
    assert served.rows() == []


def test_raw_prompts_are_refused_where_an_arm_is_a_system_prompt(served: Served, tmp_path: Path) -> None:
    assert served.ask({"model": "tone", "prompt": "x"}, "/v1/completions")[0] == 400


@pytest.mark.parametrize("more", [{"use_beam_search": True}, {"background": True}, {"prompt": "x"}])
def test_what_can_t_get_every_arm_takes_no_part_where_clients_call_the_model(tmp_path: Path, more: Any) -> None:
    """They call it as they did before there was an experiment; who names the experiment is refused."""
    served = Served(tmp_path, clients_call="model")
    body, path = {**chat(), **more}, "/v1/completions" if "prompt" in more else CHAT
    assert served.ask({**body, "model": "model"}, path)[0] == 200
    assert served.body == {**body, "model": "model"}
    status, _, text = served.ask({**body, "model": "model"}, path, x_steer_arm="friendly")
    assert (status, served.rows()) == (400, [])
    assert b"the experiment tone" in text or "background" in more
    served.live.end()


def test_routes_that_can_t_be_steered_refuse_an_experiment(served: Served) -> None:
    assert served.ask({"model": "tone"}, "/v1/audio/transcriptions")[0] == 400
    assert served.ask({"model": "tone", "prompt": "x"}, "/tokenize")[0] == 200
    assert served.body["model"] == "model"
    assert served.rows() == []


def test_a_replaced_vector_is_never_served(served: Served) -> None:
    served.vectors["warm"] = served.vectors["calm"]
    status, _, text = served.chat(x_steer_arm="friendly")
    assert (status, b"was replaced" in text) == (503, True)
    assert served.body is None


def test_requests_for_the_model_take_part_where_the_file_says_so(tmp_path: Path) -> None:
    served = Served(tmp_path, clients_call="model")
    _, headers, body = served.ask({**chat(), "model": "model"})
    assert headers["x-steer-experiment"] == "tone; version=1"
    assert json.loads(body)["model"] == "model"
    served.ask({**chat(), "model": "model", "vllm_xargs": {"steer": "warm"}})
    assert len(served.rows()) == 1  # the second is steered by itself
    served.live.end()


@pytest.mark.parametrize("called", ["other", "", None])
def test_the_model_is_called_by_any_of_its_names_and_by_none(tmp_path: Path, called: str | None) -> None:
    served = Served(tmp_path, clients_call="model")
    body = {key: value for key, value in {**chat(), "model": called}.items() if value is not None}
    _, headers, _ = served.ask(body)
    assert headers["x-steer-experiment"] == "tone; version=1"
    assert len(served.rows()) == 1
    served.live.end()


@pytest.mark.parametrize(
    ("status", "raises", "recorded"),
    [(500, None, 500), (400, None, 400), (200, RuntimeError("defect"), 500), (200, asyncio.CancelledError(), 499)],
)
def test_an_answer_that_failed_is_recorded_as_that(
    served: Served, status: int, raises: BaseException | None, recorded: int
) -> None:
    served.status, served.raises = status, raises
    with contextlib.suppress(RuntimeError, asyncio.CancelledError):
        served.chat()
    (row,) = served.rows()
    assert (row["status"], row["counted"]) == (recorded, 1)


@pytest.mark.parametrize(
    ("error", "recorded"),
    [
        ({"type": "BadRequestError", "code": 400}, 400),
        ({"type": "InternalServerError", "code": 503}, 503),
        ({"type": "invalid_request_error"}, 400),
        ({"type": "api_error"}, 500),
    ],
)
def test_a_stream_that_breaks_off_has_the_status_of_its_error(
    served: Served, error: dict[str, Any], recorded: int
) -> None:
    served.kind, served.parts = STREAM, [*events({"error": {"message": "x", **error}}), b"data: [DONE]\n\n"]
    served.ask(chat(stream=True))
    assert [row["status"] for row in served.rows()] == [recorded]


def test_steering_that_the_engine_refuses_is_a_failure_of_the_server(served: Served) -> None:
    served.status, served.refuses = 400, True
    served.parts = [json.dumps({"error": {"message": "x", "type": "BadRequestError", "code": 400}}).encode()]
    assert served.chat(x_steer_arm="friendly")[0] == 400
    assert served.chat(x_steer_arm="control")[0] == 400
    assert [row["status"] for row in served.rows()] == [500, 400]


def test_requests_that_are_refused_for_what_a_client_sends_stop_nothing(tmp_path: Path) -> None:
    """One client sends the same bad request again and again, always to its arm."""
    served, users = Served(tmp_path, guardrails={"latency_p95": 1000.0}), [f"user {i}" for i in range(30)]
    steered = next(user for user in users if "control" not in served.chat(user)[1]["x-steer-arm"])
    for user in users * 6:
        served.chat(user)
    served.status, served.parts = 400, [b'{"error": {"message": "the prompt is too long", "code": 400}}']
    for _ in range(200):
        assert served.chat(steered)[0] == 400
    served.live.check()
    assert not served.live.state.stopped
    assert served.rows()[-1]["status"] == 400
    counts = overview(served.live.engine, "tone", 1)["arms"]
    assert sum(arm["refused"] for arm in counts.values()) == 200
    assert sum(arm["failed"] for arm in counts.values()) == 0
    served.status = 500
    for _ in range(200):
        served.chat(steered)
    served.live.check()
    assert "error_rate" in served.live.state.stopped
    served.live.end()


def test_traces_are_read_and_sent_back(served: Served) -> None:
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    _, headers, _ = served.chat(traceparent=parent, baggage="team=x")
    arm = headers["x-steer-arm"].removeprefix("tone:")
    assert (headers["traceparent"], headers["baggage"]) == (parent, f"team=x,steer.experiment=tone,steer.arm={arm}")
    _, headers, _ = served.chat(baggage="steer.arm=evil, steer.experiment = no,team=x")
    assert headers["baggage"] == f"team=x,steer.experiment=tone,steer.arm={arm}"
    assert served.rows()[0]["trace"] == "a" * 32
    _, headers, _ = served.chat(traceparent="nonsense")
    assert "traceparent" not in headers


def test_opentelemetry_gets_the_experiment_where_it_is_on(served: Served) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    served.chat(traceparent=f"00-{'a' * 32}-{'b' * 16}-01", x_steer_arm="friendly")
    (span,) = exporter.get_finished_spans()
    arm = served.live.experiment.arm("friendly")
    assert arm is not None
    assert dict(span.attributes) == {"steer.experiment": "tone", "steer.arm": "friendly", "steer.digest": arm.digest}
    assert (span.context.trace_id, span.parent.span_id) == (int("a" * 32, 16), int("b" * 16, 16))


def test_texts_are_stored_only_if_the_file_says_so(tmp_path: Path) -> None:
    served = Served(tmp_path, store_texts=True)
    served.chat(x_steer_arm="prompt")
    (row,) = served.rows()
    assert (json.loads(row["prompt"]), row["answer"]) == ([{"role": "user", "content": "Hello"}], "Hi there")
    served.live.end()


@pytest.mark.parametrize("field", ["message", "text"])
def test_several_answers_are_measured_each_for_itself_also_where_a_stream_brings_them_interleaved(
    tmp_path: Path, field: str
) -> None:
    texts = ["a b c d e a b c d", "Sorry, I can't help", "a b c d e a b c d"]
    choices = [{"index": i, field: {"content": text} if field == "message" else text} for i, text in enumerate(texts)]
    served = Served(tmp_path, store_texts=True)
    served.parts = [json.dumps({"id": "r1", "model": "model", "choices": choices}).encode()]
    served.ask(chat(n=3))
    words = [text.replace(" ", "\0 ").split("\0") for text in texts]
    pieces = [
        {"id": "r2", "choices": [{"index": i, **({"text": word} if field == "text" else {"delta": {"content": word}})}]}
        for i, word in ((i, word) for at in itertools.zip_longest(*words) for i, word in enumerate(at))
        if word is not None
    ]  # fmt: skip
    served.kind, served.parts = STREAM, [*events(*pieces), b"data: [DONE]\n\n"]
    served.ask(chat(n=3, stream=True))
    for row in served.rows():
        assert row["answer"] == "\n\n".join(texts)
        assert row["characters"] == sum(map(len, texts))
        assert row["repetition"] == pytest.approx((2 * repetition(texts[0]) + repetition(texts[1])) / 3)
        assert row["repetition"] > 0
        assert row["refusal"] == 1
    served.live.end()


def test_feedback_is_joined_to_its_answer(served: Served) -> None:
    served.chat()
    status, body = served.say({"response_id": "chat-1", "metric": "thumbs", "value": True, "comment": "<b>'; DROP"})
    assert (status, body["mark"]) == (200, None)
    (row,) = served.rows("feedback")
    assert (row["version"], row["value"], row["comment"], row["mark"]) == (1, 1.0, "<b>'; DROP", "")


def test_an_id_that_feedback_could_not_name_is_a_hash_in_the_log(served: Served) -> None:
    """Clients choose ids (X-Request-Id) of any length, which no index takes."""
    previous = None
    for identity in ("i" * 512, "i" * 513, "a\0b", "end"):
        served.parts = [json.dumps({"id": identity, "output": [], "status": "completed"}).encode()]
        body = {"model": "tone", "input": f"after {previous}", "previous_response_id": previous}
        served.ask(body, "/v1/responses")
        previous = identity
    rows = served.rows()
    known = [row["response"] for row in rows]
    assert [response[:7] for response in known] == ["i" * 7, "sha256:", "sha256:", "end"]
    assert max(map(len, known)) == 512
    assert len({row["conversation"] for row in rows}) == 1


def test_feedback_that_is_lost_is_never_acknowledged(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.chat()
    said = {"response_id": "chat-1", "metric": "thumbs", "value": True, "idempotency_key": "k"}
    monkeypatch.setattr(served.live.writer.journal, "append", lambda row: False)  # the disk is full, and memory too
    monkeypatch.setattr(served.live.writer, "most_waiting", 0)
    status, body = served.say(said)
    assert (status, "send it again" in body["error"]["message"]) == (503, True)
    assert (served.rows("feedback"), served.live.writer.dropped) == ([], 1)
    monkeypatch.setattr(served.live.writer, "most_waiting", 1)
    assert served.say(said)[0] == 200  # from memory it reaches the database
    assert len(served.rows("feedback")) == 1


def test_comments_and_demonstrations_need_no_metric(served: Served) -> None:
    served.chat()
    about = {"response_id": "chat-1"}
    assert served.say({**about, "comment": "good"})[0] == served.say({**about, "demonstration": "Hi!"})[0] == 200
    assert {row["metric"]: row["value"] for row in served.rows("feedback")} == {"comment": None, "demonstration": None}
    status, body = served.say({**about, "value": True})
    assert (status, "metric is missing; metrics: thumbs" in body["error"]["message"]) == (400, True)


def test_feedback_is_idempotent_by_its_key(served: Served) -> None:
    said = {"response_id": "chat-1", "metric": "thumbs", "value": True, "idempotency_key": "k1"}
    assert served.say(said)[1]["id"] == served.say(said)[1]["id"]
    served.say({**said, "idempotency_key": "k2"})
    assert len(served.rows("feedback")) == 2


def test_one_key_for_several_answers_or_metrics_loses_none(served: Served) -> None:
    about: list[dict[str, Any]] = [{"response_id": "a"}, {"response_id": "b"}, {"conversation_id": "a"}]
    given = [{**each, "metric": "thumbs", "value": True, "idempotency_key": "k"} for each in about]
    given.append({"response_id": "a", "metric": "why", "comment": "good", "idempotency_key": "k"})
    assert len({served.say(each)[1]["id"] for each in given * 2}) == len(given)
    assert len(served.rows("feedback")) == len(given)


def test_unknown_and_late_feedback_is_kept_and_marked(served: Served) -> None:
    assert served.say({"response_id": "nothing", "metric": "thumbs", "value": False})[1]["mark"] == "unknown"
    served.chat()
    served.live.stop("by hand")
    assert served.say({"response_id": "chat-1", "metric": "thumbs", "value": True})[1]["mark"] == "late"
    assert {row["mark"] for row in served.rows("feedback")} == {"unknown", "late"}


def test_feedback_about_an_answer_of_before_a_restart_is_found_in_the_log(served: Served) -> None:
    served.chat()
    served.rows()
    served.live.conversations.forget()
    assert served.say({"response_id": "chat-1", "metric": "thumbs", "value": True})[1]["mark"] is None


def test_feedback_about_another_experiment_is_refused(served: Served, tmp_path: Path) -> None:
    served.chat()
    served.rows()
    with sqlite3.connect(tmp_path / "tone.db") as connection:
        connection.execute("UPDATE exposures SET experiment = 'other'")
    served.live.conversations.forget()
    assert served.say({"response_id": "chat-1", "metric": "thumbs", "value": True})[0] == 409
    assert served.say({"response_id": "x", "metric": "thumbs", "value": True, "experiment": "other"})[0] == 404
    assert served.rows("feedback") == []


@pytest.mark.parametrize(
    ("body", "status", "problem"),
    [
        (b"no json", 400, "not JSON"),
        (b"[1]", 400, "no object"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, 400, "nested"),
        ({"metric": "thumbs", "value": True}, 400, "either response_id or conversation_id"),
        ({"response_id": "a", "conversation_id": "b", "metric": "thumbs", "value": True}, 400, "either"),
        ({"response_id": "a", "metric": "thumbs"}, 400, "give a value"),
        ({"response_id": "a", "metric": "thumbs", "value": "yes"}, 400, "true, false or a number"),
        ({"response_id": "a", "metric": "thumbs", "value": 0.5}, 400, "true or false"),
        ({"response_id": "a", "metric": "stars", "value": 1}, 400, "no metric"),
        ({"response_id": "a", "metric": "<script>", "comment": "x"}, 400, "metric is"),
        ({"response_id": "a", "metric": "thumbs", "value": True, "weight": 3}, 400, "no field"),
        ({"response_id": "a", "metric": "thumbs", "comment": "x" * 200_000}, 400, "comment is"),
        ({"response_id": 5, "metric": "thumbs", "value": True}, 400, "response_id is 5"),
        ({"response_id": "a\0b", "metric": "thumbs", "value": True}, 400, "response_id is"),
    ],
)
def test_feedback_that_means_nothing_is_refused(served: Served, body: Any, status: int, problem: str) -> None:
    found, answer = served.say(body)
    assert (found, problem in answer["error"]["message"]) == (status, True), answer
    assert served.rows("feedback") == []


@pytest.mark.parametrize("value", [1e308, -1e16, 10**400])
def test_a_value_whose_square_no_database_can_add_up_is_refused(value: float) -> None:
    """PostgreSQL would refuse the report of the whole experiment."""
    metrics = {"score": Metric("score", "number")}
    found = given_feedback.problems_of({"response_id": "a", "metric": "score", "value": value}, metrics)
    assert "not below 1e+15 in size" in " ".join(found)
    assert not given_feedback.problems_of({"response_id": "a", "metric": "score", "value": 1e12}, metrics)


@pytest.mark.parametrize(
    "unit", ["'; DROP TABLE exposures; --", "<script>alert(1)</script>", "\ud800", "a\0b", "x" * 9000]
)
def test_a_unit_of_any_text_is_a_hash_in_the_log_and_no_label(served: Served, unit: str) -> None:
    from prometheus_client import generate_latest

    assert served.chat(unit)[0] == 200
    (row,) = served.rows()
    assert len(row["unit"]) == 32
    assert unit not in json.dumps(row, ensure_ascii=False)
    exported = generate_latest().decode()
    assert "steer:exposures_total" in exported
    assert unit not in exported
    assert row["unit"] not in exported


def test_a_response_that_continues_another_has_its_arm(served: Served) -> None:
    def turn(previous: str | None, response: str) -> tuple[str, str]:
        body = {"model": "tone", "input": f"after {previous}", "previous_response_id": previous}
        value = {"id": response, "model": "model", "output": [], "status": "completed"}
        served.parts = [json.dumps(value).encode()]
        headers = served.ask(body, "/v1/responses")[1]
        return headers["x-steer-arm"], headers["x-steer-unit"]

    arm, _ = turn(None, "turn 0")
    assert {turn(f"turn {i}", f"turn {i + 1}") for i in range(8)} == {(arm, "conversation; assigned")}
    assert len({(row["unit"], row["conversation"]) for row in served.rows()}) == 1


ADAPTIVE = {"allocation": {"method": "track-and-stop"}, "metric": {"name": "thumbs", "smallest_effect": 0.1}}
USERS = [f"user {i}" for i in range(24)]


def test_users_keep_their_arms_under_adaptive_weights_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "RECALL", 60.0)  # however busy the machine is
    first = Served(tmp_path, **ADAPTIVE)
    before = {user: first.ask(chat(user))[1]["x-steer-arm"] for user in USERS}
    assert set(before.values()) == {f"tone:{arm}" for arm in ARMS}
    first.rows()
    weights = {"control": 0.05, "friendly": 0.05, "prompt": 0.9}
    epochs.begin(first.live.engine, "tone", 1, epochs.Epoch(1, weights, "prompt leads"))
    first.live.end()
    again = Served(tmp_path, **ADAPTIVE)
    assert {user: again.ask(chat(user, "Good evening"))[1]["x-steer-arm"] for user in USERS} == before
    again.chat("new")
    assert [row["epoch"] for row in again.rows()] == [0] * 48 + [1]
    again.live.end()


def test_a_log_that_does_not_answer_holds_up_no_request_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, began, released = Served(tmp_path, **ADAPTIVE), threading.Event(), threading.Event()
    assert served.live.adaptive is not None
    monkeypatch.setattr(experiments, "RECALL", 0.01)
    monkeypatch.setattr(served.live.adaptive, "look_up", lambda unit: (began.set(), released.wait(10)))
    threading.Timer(0.3, released.set).start()  # asyncio.run waits for its threads
    assert served.chat()[0] == 200
    assert began.is_set()
    assert served.rows()[0]["epoch"] == 0
    served.live.end()
