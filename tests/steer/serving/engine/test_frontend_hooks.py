"""Vectors on their way to the workers and away from them, while requests come and go."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import fakes
import pytest

from steer.serving.engine import frontend_hooks, metrics, receipts
from steer.serving.engine.admission import Admission
from steer.serving.engine.resolved import resolved_of
from steer.serving.settings import Settings

VECTORS = fakes.vectors()
WARM = VECTORS["warm"]


class Parameters(SimpleNamespace):
    """vLLM's sampling parameters."""

    def clone(self) -> Parameters:
        return Parameters(**self.__dict__)


class Processor:
    """Can be referred to weakly."""


class Engine:
    """vLLM's AsyncLLM as far as it is called; `calls` is what the workers were told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail = False
        self.output_processor = SimpleNamespace(request_states={})
        self.input_processor = Processor()
        frontend_hooks._ADMISSIONS[self.input_processor] = Admission(
            Settings({"warm": WARM}), fakes.HIDDEN, fakes.LAYERS, None
        )

    @property
    def admission(self) -> Admission:
        return frontend_hooks.admission_of(self.input_processor)

    async def collective_rpc(self, method: str, args: Any = ()) -> Any:
        await asyncio.sleep(0.01)
        if self.fail:
            raise RuntimeError("the worker is gone")
        if method in ("steer_loaded", "steer_use"):
            return [True]
        self.calls.append(method)
        return [None]

    async def add_request(self, name: str, extra: Any, *, pause: Any = None) -> Any:
        """What vLLM's does: the request is admitted, and followed until it ends."""

        async def add(engine: Any, request_id: str, prompt: Any, params: Any) -> Any:
            request = fakes.request(request_id, params.extra_args)
            engine.admission.admit(request)
            if pause is not None:
                await pause.wait()
            frontend_hooks.follow(_add, engine.output_processor, request)
            return request

        return await frontend_hooks.enter(add, self, name, None, Parameters(extra_args=extra))

    def end(self, name: str) -> None:
        state = self.output_processor.request_states.pop(name)
        frontend_hooks.finish(lambda processor, state: None, self.output_processor, state)


def _add(processor: Any, request: Any) -> None:
    processor.request_states[request.request_id] = SimpleNamespace(request_id=request.request_id)


async def until(engine: Engine, calls: list[str]) -> None:
    for _ in range(100):
        if engine.calls == calls:
            return
        await asyncio.sleep(0.01)
    assert engine.calls == calls


@pytest.fixture(autouse=True)
def in_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend_hooks, "_invalid", ValueError)
    receipts.use(None)


def test_a_vector_is_sent_once_however_many_ask() -> None:
    async def run() -> list[str]:
        engine = Engine()
        await frontend_hooks.begin_serving(engine)
        names = [f"name{i}" for i in range(5)]
        digests = await asyncio.gather(*(frontend_hooks.bind(engine, name, VECTORS["calm"]) for name in names))
        assert set(digests) == {VECTORS["calm"].digest}
        return engine.calls

    assert asyncio.run(run()) == ["steer_start_loading"] * 2


def test_a_client_that_hangs_up_does_not_end_what_others_wait_for() -> None:
    async def run() -> list[str]:
        engine = Engine()
        await frontend_hooks.begin_serving(engine)
        first = asyncio.create_task(frontend_hooks.bind(engine, "first", VECTORS["calm"]))
        second = asyncio.create_task(frontend_hooks.bind(engine, "second", VECTORS["calm"]))
        while len(engine.admission.residency._vectors) < 2:
            await asyncio.sleep(0)
        first.cancel()
        await second
        return engine.calls

    assert asyncio.run(run()) == ["steer_start_loading"] * 2


def test_what_failed_to_arrive_is_sent_again() -> None:
    async def run() -> list[str]:
        engine = Engine()
        await frontend_hooks.begin_serving(engine)
        engine.fail = True
        with pytest.raises(RuntimeError, match="gone"):
            await frontend_hooks.bind(engine, "calm", VECTORS["calm"])
        assert "calm" not in engine.admission.bound
        engine.fail = False
        await frontend_hooks.bind(engine, "calm", VECTORS["calm"])
        return engine.calls

    assert asyncio.run(run()) == ["steer_start_loading"] * 2


def test_workers_forget_a_vector_when_its_last_request_has_ended() -> None:
    async def run() -> None:
        engine = Engine()
        await frontend_hooks.begin_serving(engine)
        engine.steer_serves_http = False
        await engine.add_request("a", {"steer": "2*warm"})
        assert frontend_hooks.unbind(engine, "warm") == WARM.digest
        await asyncio.sleep(0.05)
        assert engine.calls == ["steer_start_loading"]
        engine.end("a")
        await until(engine, ["steer_start_loading", "steer_unload"])

    asyncio.run(run())


def test_workers_keep_a_vector_while_a_request_is_between_admission_and_the_engine() -> None:
    """Several answers (n > 1) enter without a pause in which they could be counted, so entering itself counts."""

    async def run() -> None:
        engine, go = Engine(), asyncio.Event()
        await frontend_hooks.begin_serving(engine)
        engine.steer_serves_http = False
        entering = asyncio.create_task(engine.add_request("a", {"steer": "2*warm"}, pause=go))
        await asyncio.sleep(0)
        frontend_hooks.unbind(engine, "warm")
        await asyncio.sleep(0.05)
        assert engine.calls == ["steer_start_loading"]
        with pytest.raises(ValueError, match="no vector is called 'warm'"):
            await engine.add_request("b", {"steer": "2*warm"})
        go.set()
        await entering
        await asyncio.sleep(0.05)
        assert engine.calls == ["steer_start_loading"], "now it runs"
        engine.end("a")
        await until(engine, ["steer_start_loading", "steer_unload"])

    asyncio.run(run())


def test_a_vector_that_has_a_name_again_stays() -> None:
    async def run() -> None:
        engine = Engine()
        await frontend_hooks.begin_serving(engine)
        engine.steer_serves_http = False
        await engine.add_request("a", {"steer": "warm"})
        frontend_hooks.unbind(engine, "warm")
        await frontend_hooks.bind(engine, "warm", WARM)
        engine.end("a")
        await asyncio.sleep(0.05)
        assert engine.calls == ["steer_start_loading"]

    asyncio.run(run())


def test_what_http_has_resolved_is_what_the_engine_gets_though_the_name_stands_for_another_by_then() -> None:
    async def run() -> None:
        engine = Engine()
        await frontend_hooks.begin_serving(engine)
        admission = engine.admission
        promised = admission.resolve("2*warm")
        with admission.residency.holding(promised.vectors.values()):
            frontend_hooks.unbind(engine, "warm")
            await frontend_hooks.bind(engine, "warm", VECTORS["calm"])
            receipts.use(receipts.HttpRequest(None, "2*warm", promised))
            request = await engine.add_request("a", {"steer": "2*warm"})
        assert resolved_of(request) == promised
        assert promised.vectors == {"warm": WARM.digest}
        assert engine.calls == ["steer_start_loading"] * 2, "the first is still needed"
        receipts.use(None)
        engine.end("a")
        await until(engine, ["steer_start_loading", "steer_start_loading", "steer_unload"])

    asyncio.run(run())


def test_a_route_that_the_middleware_does_not_know_generates_nothing_steered() -> None:
    async def run() -> None:
        engine = Engine()
        await frontend_hooks.begin_serving(engine)
        with pytest.raises(ValueError, match="this route can't be steered"):
            await engine.add_request("a", {"steer": "2*warm"})
        assert (await engine.add_request("plain", {"other": 1})).request_id == "plain"

    asyncio.run(run())


def state(name: str) -> Any:
    """An output processor with one steered request under way."""
    processor = SimpleNamespace(request_states={})
    frontend_hooks.follow(_add, processor, fakes.request(name, fakes.resolved("2*warm", VECTORS)))
    return processor


def test_an_aborted_request_is_counted_as_one() -> None:
    pytest.importorskip("prometheus_client")
    processor = state("a")
    counter = metrics.get().requests.labels("expression", "aborted")
    before = counter._value.get()
    frontend_hooks.abort(lambda self, names: self.request_states.pop("a"), processor, ["a"])
    assert counter._value.get() == before + 1


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
