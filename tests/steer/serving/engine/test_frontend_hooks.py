"""Vectors on their way to the workers and away from them, while requests come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fakes
import pytest

from steer.serving.engine import frontend_hooks, metrics
from steer.serving.engine.admission import Admission
from steer.serving.settings import Settings

VECTORS = fakes.vectors()
WARM = VECTORS["warm"]


class Engine:
    """vLLM's AsyncLLM as far as it is called; `calls` is what the workers were told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail = False
        self.input_processor = Processor()
        frontend_hooks._ADMISSIONS[self.input_processor] = Admission(
            Settings(VECTORS), fakes.HIDDEN, fakes.LAYERS, None
        )

    async def collective_rpc(self, method: str, args: Any = ()) -> None:
        await asyncio.sleep(0.01)
        if self.fail:
            raise RuntimeError("the worker is gone")
        self.calls.append(method)


class Processor:
    """Can be referred to weakly."""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    frontend_hooks._RUNNING.clear()
    frontend_hooks._ENTERING.clear()
    yield
    frontend_hooks._RUNNING.clear()
    frontend_hooks._ENTERING.clear()


def test_a_vector_is_sent_once_however_many_ask() -> None:
    async def run() -> list[str]:
        engine = Engine()
        await asyncio.gather(*(frontend_hooks.deliver(engine, WARM) for _ in range(5)))
        await frontend_hooks.deliver(engine, WARM)
        return engine.calls

    assert asyncio.run(run()) == ["steer_load"]


def test_a_client_that_hangs_up_does_not_end_what_others_wait_for() -> None:
    async def run() -> list[str]:
        engine = Engine()
        first = asyncio.create_task(frontend_hooks.deliver(engine, WARM))
        second = asyncio.create_task(frontend_hooks.deliver(engine, WARM))
        await asyncio.sleep(0)
        first.cancel()
        await second
        return engine.calls

    assert asyncio.run(run()) == ["steer_load"]


def test_what_failed_to_arrive_is_sent_again() -> None:
    async def run() -> list[str]:
        engine = Engine()
        engine.fail = True
        with pytest.raises(RuntimeError, match="gone"):
            await frontend_hooks.deliver(engine, WARM)
        engine.fail = False
        await frontend_hooks.deliver(engine, WARM)
        return engine.calls

    assert asyncio.run(run()) == ["steer_load"]


def state(name: str) -> Any:
    """An output processor with one steered request under way."""
    processor = SimpleNamespace(request_states={})
    request = fakes.request(name, fakes.resolved("2*warm", VECTORS))

    def add(self: Any, request: Any) -> None:
        self.request_states[request.request_id] = SimpleNamespace()

    frontend_hooks.follow(add, processor, request)
    return processor


def test_workers_forget_a_vector_when_its_last_request_has_ended() -> None:
    async def run() -> list[str]:
        engine = Engine()
        await frontend_hooks.deliver(engine, WARM)
        processor = state("a")
        frontend_hooks.admission_of(engine.input_processor).unbind("warm")
        discarding = asyncio.create_task(frontend_hooks.discard(engine, WARM.digest, every=0.01))
        await asyncio.sleep(0.05)
        assert engine.calls == ["steer_load"]
        frontend_hooks.finish(lambda self, one: None, processor, processor.request_states["a"])
        await discarding
        return engine.calls

    assert asyncio.run(run()) == ["steer_load", "steer_unload"]


def test_workers_keep_a_vector_while_a_request_is_between_admission_and_the_engine() -> None:
    """Several answers (n > 1) enter without a pause in which they could be counted, so entering itself counts."""

    async def run() -> None:
        engine, go = Engine(), asyncio.Event()
        await frontend_hooks.deliver(engine, WARM)

        async def add_request(self: Any) -> str:
            await go.wait()
            return "queue"

        entering = asyncio.create_task(frontend_hooks.enter(add_request, engine))
        await asyncio.sleep(0)
        frontend_hooks.admission_of(engine.input_processor).unbind("warm")
        discarding = asyncio.create_task(frontend_hooks.discard(engine, WARM.digest, every=0.01))
        await asyncio.sleep(0.05)
        later = asyncio.create_task(
            frontend_hooks.enter(add_request, engine)
        )  # admitted without the vector: nobody waits for it
        await asyncio.sleep(0)
        assert engine.calls == ["steer_load"]
        go.set()
        assert await entering == "queue"
        await asyncio.gather(discarding, later)
        assert engine.calls == ["steer_load", "steer_unload"]

    asyncio.run(run())


def test_a_vector_that_has_a_name_again_stays() -> None:
    async def run() -> list[str]:
        engine = Engine()
        admission = frontend_hooks.admission_of(engine.input_processor)
        await frontend_hooks.deliver(engine, WARM)
        frontend_hooks._RUNNING[WARM.digest] = 1
        admission.unbind("warm")
        discarding = asyncio.create_task(frontend_hooks.discard(engine, WARM.digest, every=0.01))
        await asyncio.sleep(0.02)
        admission.bind("warm", WARM)
        frontend_hooks._RUNNING[WARM.digest] = 0
        await discarding
        return engine.calls

    assert asyncio.run(run()) == ["steer_load"]


def test_an_aborted_request_is_counted_as_one() -> None:
    pytest.importorskip("prometheus_client")
    processor = state("a")
    assert frontend_hooks._RUNNING[WARM.digest] == 1
    counter = metrics.get().requests.labels("expression", "aborted")
    before = counter._value.get()
    frontend_hooks.abort(lambda self, names: self.request_states.pop("a"), processor, ["a"])
    assert (frontend_hooks._RUNNING[WARM.digest], counter._value.get()) == (0, before + 1)


def test_the_receipt_is_taken_off_before_vllm_sees_the_output_and_put_on_the_completion() -> None:
    processor = state("a")
    one = processor.request_states["a"]
    table = {"rows": 4, "rows_held": 1, "waiting": 0}
    carried = {"steer": {"response_tokens": 3, "prompt_tokens": 2, "capacity": table}}
    output = SimpleNamespace(request_id="a", kv_transfer_params=carried)
    other = SimpleNamespace(request_id="b", kv_transfer_params={"theirs": 1})
    seen = frontend_hooks.process_outputs(
        lambda self, outputs: [o.kv_transfer_params for o in outputs], processor, [output, other]
    )
    assert seen == [None, {"theirs": 1}]
    one.request_id = "a"
    finished = frontend_hooks.new_completion_output(lambda self, ids, reason: SimpleNamespace(), one, [], "stop")
    assert finished.steer == {"response_tokens": 3, "prompt_tokens": 2}
    running = frontend_hooks.new_completion_output(lambda self, ids, reason: SimpleNamespace(), one, [], None)
    assert not hasattr(running, "steer")
