"""A vector that somebody needs is never unloaded, however names, deliveries and requests follow each other."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from steer.serving.engine import residency
from steer.serving.engine.residency import Residency, State

CONTENTS = {"A": b"A", "B": b"B"}


class Workers:
    """The workers as the front end sees them: calls are carried out in order, when the test lets the next one go."""

    def __init__(self) -> None:
        self.vectors: set[str] = set()
        self.loading: set[str] = set()
        self.asked: dict[str, int] = {}  # how often, since it began to load
        self.queue: deque[tuple[str, Any, asyncio.Future[Any]]] = deque()
        self.calls: list[str] = []
        self.failing = 0
        self.needed: list[str] = []  # digests of requests under way

    async def call(self, method: str, args: Any) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.queue.append((method, args[0], answer))
        return await answer

    def step(self) -> None:
        if not self.queue:
            return
        method, argument, answer = self.queue.popleft()
        self.calls.append(method)
        value: Any = None
        if method == "steer_start_loading":
            self.loading.add(argument)
        elif method == "steer_loaded" and self.failing:
            self.failing -= 1
            answer.set_exception(RuntimeError("the worker refuses"))
            return
        elif method == "steer_loaded":
            value = self.asked.get(argument, 0) > 0  # only the second question is answered yes
            self.asked[argument] = self.asked.get(argument, 0) + 1
        elif method == "steer_use":
            self.loading.remove(argument)
            self.vectors.add(argument)
            self.asked.pop(argument)
        else:
            assert argument not in self.needed, "unloaded under a request"
            self.vectors.discard(argument)
            self.loading.discard(argument)
            self.asked.pop(argument, None)
        if not answer.done():
            answer.set_result([value])


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "INTERVAL", 0)


class Server:
    """Names, posts, deletes and requests over one residency, as the front end uses it."""

    def __init__(self) -> None:
        self.workers = Workers()
        self.residency = Residency()
        self.residency.connect(self.workers.call)
        self.names: dict[str, str] = {}
        self.requests: list[str] = []
        self.posts: list[asyncio.Task[None]] = []

    async def post(self, name: str, digest: str) -> None:
        with contextlib.suppress(RuntimeError):
            async with self.residency.delivered(digest, CONTENTS[digest]):
                if name not in self.names:
                    self.names[name] = digest
                    self.residency.hold([digest])

    def delete(self, name: str) -> None:
        if name in self.names:
            self.residency.release([self.names.pop(name)])

    def begin(self, name: str) -> None:
        if name in self.names:
            digest = self.names[name]
            self.residency.hold([digest])  # raises if it were not loaded, though its name stands
            self.requests.append(digest)
            self.workers.needed.append(digest)

    def end(self, which: int) -> None:
        if self.requests:
            digest = self.requests.pop(which % len(self.requests))
            self.workers.needed.remove(digest)
            self.residency.release([digest])

    def check(self) -> None:
        for digest in [*self.requests, *self.names.values()]:
            assert digest in self.workers.vectors
            assert self.residency.state(digest) is State.LOADED


ACTIONS = st.one_of(
    st.tuples(st.just("post"), st.sampled_from("xy"), st.sampled_from("AB")),
    st.tuples(st.just("delete"), st.sampled_from("xy")),
    st.tuples(st.just("begin"), st.sampled_from("xy")),
    st.tuples(st.just("end"), st.integers(0, 3)),
    st.tuples(st.just("hang up"), st.integers(0, 3)),
    st.tuples(st.just("fail")),
    st.tuples(st.just("worker")),
    st.tuples(st.just("worker")),
)


async def run(actions: list[tuple[Any, ...]]) -> None:
    server = Server()

    async def settle() -> None:
        for _ in range(6):
            await asyncio.sleep(0)

    for action, *arguments in actions:
        if action == "post":
            server.posts.append(asyncio.create_task(server.post(*arguments)))
        elif action == "worker":
            server.workers.step()
        elif action == "fail":
            server.workers.failing = 1
        elif action == "hang up":
            if server.posts:
                server.posts[arguments[0] % len(server.posts)].cancel()
        else:
            getattr(server, action)(*arguments)
        # Not after every action: several may fall between two turns of the loop.
        if action in ("worker", "post"):
            await settle()
        server.check()
    server.workers.failing = 0
    for _ in range(200):
        server.workers.step()
        await settle()
    server.check()
    assert all(post.done() for post in server.posts)
    assert server.workers.vectors == {*server.requests, *server.names.values()}, "what nobody needs is unloaded"
    while server.requests:
        server.end(0)
    for name in list(server.names):
        server.delete(name)
    for _ in range(50):
        server.workers.step()
        await settle()
    assert not server.workers.vectors
    assert not server.workers.loading
    assert not server.residency._vectors, "nothing is remembered of what is gone"


@given(st.lists(ACTIONS, max_size=40))
@settings(max_examples=300, deadline=None)
def test_over_all_interleavings_what_is_needed_is_loaded_and_what_is_not_is_unloaded(
    actions: list[tuple[Any, ...]],
) -> None:
    asyncio.run(run(actions))


def test_the_sequence_that_once_ended_the_engine() -> None:
    """A request with V named x; DELETE x, POST x, DELETE x, the request ends, POST x, a request for x."""
    loads = [("worker",)] * 4
    asyncio.run(
        run(
            [
                *[("post", "x", "A"), *loads, ("begin", "x"), ("delete", "x"), ("post", "x", "A"), ("delete", "x")],
                *[("end", 0), ("post", "x", "A"), ("worker",), *loads, ("begin", "x"), ("worker",), ("worker",)],
            ]
        )
    )


def test_two_unloads_never_wait_for_one_vector() -> None:
    async def go() -> None:
        server = Server()
        tasks = [asyncio.create_task(server.post(name, "A")) for name in "xy"]
        for _ in range(4):
            await asyncio.sleep(0.01)
            server.workers.step()
        await asyncio.wait_for(asyncio.gather(*tasks), 5)
        for name in "xy":
            server.delete(name)
        await asyncio.sleep(0.01)
        assert [method for method, *_ in server.workers.queue] == ["steer_unload"]
        assert server.residency.state("A") is State.UNLOADING
        with pytest.raises(LookupError, match="not loaded in the workers: A"):
            server.residency.hold(["A"])
        server.workers.step()
        await asyncio.sleep(0.01)
        assert server.residency.state("A") is State.ABSENT

    asyncio.run(go())


def test_a_vector_counts_as_loaded_when_every_worker_has_it() -> None:
    answers = [[True, False], [False, True], [True, True]]

    async def go() -> None:
        found = Residency()

        async def call(method: str, args: Any) -> Any:
            return answers.pop(0) if method == "steer_loaded" else None

        found.connect(call)
        async with found.delivered("A", b"A"):
            assert not answers

    asyncio.run(go())


@pytest.mark.parametrize("shared", [False, True])
def test_a_front_end_that_fails_unloads_only_what_it_alone_uses(shared: bool) -> None:
    calls: list[str] = []

    async def call(method: str, args: Any) -> Any:
        calls.append(method)
        raise RuntimeError("no answer")

    async def deliver() -> None:
        found = Residency()
        found.connect(call, shared=shared)
        async with found.delivered("A", b"A"):
            raise AssertionError("loaded")

    with pytest.raises(RuntimeError, match="no answer"):
        asyncio.run(deliver())
    assert calls == ["steer_start_loading", *([] if shared else ["steer_unload"])]


def test_offline_every_vector_is_there_and_none_is_held() -> None:
    found = Residency()
    with found.holding(["A", "B"]):
        pass
    found.release(["A"])
