"""Asking a judge over HTTP: a real server on loopback that answers, fails, recovers, or is not there."""

from __future__ import annotations

import dataclasses
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent))

from judge_server import Judge, asked, judge

from steer.evaluation.judging.client import Reply, ask
from steer.evaluation.judging.endpoint import Endpoint, endpoint
from vectors.errors import UsageError


def reached(server: Judge, **changes: Any) -> Endpoint:
    settings = {"url": server.url, "model": "m", "backoff": 0.01, **changes}
    return Endpoint(**settings)


def test_answers_come_in_the_order_of_the_prompts_and_equal_prompts_are_sent_once() -> None:
    def slower_first(body: dict[str, Any]) -> str:
        time.sleep(0.05 if asked(body) == "a" else 0)
        return asked(body).upper()

    with judge(slower_first) as server:
        assert ask(reached(server), ["a", "b", "a", "c"]) == [Reply("A"), Reply("B"), Reply("A"), Reply("C")]
        assert sorted(asked(body) for body in server.requests) == ["a", "b", "c"]
        assert server.requests[0]["path"] == "/v1/chat/completions"
        assert server.requests[0]["temperature"] == 0.0


def test_a_judge_that_fails_for_a_while_is_asked_again_with_growing_waits() -> None:
    failures = iter([500, 429, 503])
    waits: list[float] = []

    def recovering(_body: dict[str, Any]) -> str | tuple[int, dict[str, str], bytes]:
        status = next(failures, None)
        return "yes" if status is None else (status, {}, b"busy")

    with judge(recovering) as server:
        assert ask(reached(server, backoff=1.0), ["a"], sleep=waits.append) == [Reply("yes")]
    assert waits == [1.0, 2.0, 4.0]


def test_the_wait_that_a_judge_asks_for_is_granted_up_to_a_bound() -> None:
    answers: Any = iter([(429, {"Retry-After": "7"}, b""), (429, {"Retry-After": "9999"}, b""), "yes"])
    waits: list[float] = []
    with judge(lambda _: next(answers)) as server:
        assert ask(reached(server), ["a"], sleep=waits.append) == [Reply("yes")]
    assert waits == [7.0, 0.01, 30.0, 0.02]


def test_a_judge_that_is_down_is_given_up_and_every_answer_says_why() -> None:
    with socket.socket() as taken:  # a port at which nothing listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        waits: list[float] = []
        where = Endpoint(url=url, model="m", attempts=2, concurrency=1)
        replies = ask(where, [str(i) for i in range(50)], sleep=waits.append)
    assert all(reply.text is None and "can't be reached" in reply.problem for reply in replies)
    assert len(waits) == 3  # three requests with two tries; the other 47 are not sent


def test_a_refused_key_ends_the_questions_at_once_and_is_never_repeated_in_the_reason() -> None:
    refusal = (401, {}, b'{"error": "bad key: sk-secret"}')
    with judge(lambda _: refusal) as server:
        replies = ask(reached(server, key="sk-secret", concurrency=1), ["a", "b", "c"])
        assert len(server.requests) == 1
        assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert {reply.problem for reply in replies} == {'the judge answers with HTTP 401: {"error": "bad key: (the key)"}'}


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-secret\u2026"])
def test_a_key_that_can_t_be_sent_is_a_failure_that_does_not_show_it(key: str) -> None:
    with judge(lambda _: "yes") as server:
        (reply,) = ask(reached(server, key=key), ["a"])
        assert server.requests == []
    assert "the request to the judge can't be sent" in reply.problem
    assert "sk-secret" not in reply.problem


def test_one_request_that_is_refused_does_not_end_the_others() -> None:
    answers: Any = lambda body: (400, {}, b"too long") if asked(body) == "b" else "yes"  # noqa: E731
    with judge(answers) as server:
        replies = ask(reached(server, concurrency=1), ["a", "b", "c"])
    assert [reply.text for reply in replies] == ["yes", None, "yes"]


def test_a_redirect_is_not_followed_so_the_key_goes_nowhere_else() -> None:
    with judge(lambda _: "yes") as other, judge(lambda _: (307, {"Location": other.url}, b"")) as server:
        (reply,) = ask(reached(server, key="sk-secret"), ["a"])
        assert other.requests == []
    assert "HTTP 307" in reply.problem


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": 5}]}'])
def test_an_answer_that_is_no_chat_completion_is_missing(content: bytes) -> None:
    with judge(lambda _: (200, {}, content)) as server:
        assert ask(reached(server), ["a"])[0].problem == "the judge's answer is not a chat completion"


def test_a_judge_that_sends_its_answer_in_drips_is_out_of_time() -> None:
    def slow(_body: dict[str, Any]) -> str:
        time.sleep(0.3)
        return "late"

    with judge(slow) as server:
        (reply,) = ask(reached(server, timeout=0.05, attempts=1), ["a"])
    assert reply.text is None
    assert "timed out" in reply.problem


def test_a_file_names_the_judge_and_the_file_of_its_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-secret\n")
    (tmp_path / "judge.yaml").write_text("url: http://localhost:8000/v1/\nmodel: 4o\nkey_file: key\ntimeout: 5\n")
    made = endpoint(str(tmp_path / "judge.yaml"), environment={})
    assert made == Endpoint(url="http://localhost:8000/v1", model="4o", key="sk-secret", timeout=5)
    assert "sk-secret" not in repr(made)
    assert "sk-secret" not in str(made.value())


def test_the_key_comes_from_the_environment_where_no_file_is_given() -> None:
    made = endpoint("http://localhost:8000/v1", model="m", environment={"STEER_JUDGE_KEY": "k", "OPENAI_API_KEY": "x"})
    assert made.key == "k"
    assert endpoint("http://h/v1", model="m", environment={"OPENAI_API_KEY": "x"}).key == ""


def test_all_problems_of_a_judge_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "judge.yaml").write_text("url: http://me:pw@host/v1/chat/completions?x=1\nmodle: 4o\nattempts: 0\n")
    with pytest.raises(UsageError) as caught:
        endpoint(str(tmp_path / "judge.yaml"), key_file=tmp_path / "nothing", environment={})
    text = str(caught.value)
    parts = ["judge.model is missing", "'modle' (did you mean model?)", "attempts is 0", "a user name or a password"]
    for part in [*parts, "a query", "/chat/completions, which is added", "nothing can't be read"]:
        assert part in text
    assert "pw" not in text


@pytest.mark.parametrize(("url", "part"), [("http:///v1", "not http://HOST"), ("http://h:x/v1", "not valid")])
def test_a_url_is_checked_before_anything_is_sent(url: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        endpoint(url, model="m", environment={})


def test_concurrency_bounds_the_requests_under_way() -> None:
    lock, under_way, most = threading.Lock(), 0, 0

    def counting(_body: dict[str, Any]) -> str:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.01)
        with lock:
            under_way -= 1
        return "yes"

    with judge(counting) as server:
        ask(dataclasses.replace(reached(server), concurrency=3), [str(i) for i in range(12)])
    assert 2 <= most <= 3
