"""The worker points every token at its slot, and the two model runners tell it of every step."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import fakes
import numpy as np
import pytest
import torch
from torch import nn

from steer.serving.engine.proving.forms import Form, Proved
from steer.serving.engine.worker.runners import attach
from steer.serving.engine.worker.slots import SlotTable
from steer.serving.engine.worker.steering_worker import SteeringWorker

VECTORS = fakes.vectors()


def worker(slots: int = 8, layers: Sequence[int] = range(fakes.LAYERS)) -> SteeringWorker:
    """A worker that holds these layers of the model."""
    decoder = {layer: Proved(nn.Linear(1, 1), Form(None)) for layer in layers}
    state = SteeringWorker(decoder, {"rows": slots, "directions": 2}, 64, fakes.HIDDEN)
    for vector in VECTORS.values():
        assert state.load(vector.encode()) == vector.digest
    return state


def begin(state: SteeringWorker, name: str, expression: str | None, prompt: int = 3) -> None:
    state.begin(name, prompt, fakes.resolved(expression, VECTORS) if expression else None)


def point(state: SteeringWorker, steps: dict[str, tuple[int, int]]) -> list[int]:
    """Point a step (start and count by request) and return the buffer."""
    starts, counts = (np.array([step[i] for step in steps.values()]) for i in (0, 1))
    state.point(list(steps), starts, counts)
    return state.token_slots.tolist()


def test_each_token_of_a_mixed_batch_points_at_the_content_of_its_phase() -> None:
    state = worker()
    begin(state, "a", "warm@prompt + calm@first:2")
    begin(state, "plain", None)
    begin(state, "b", "2*warm")
    prompt, first = state.live["a"].slots[:2]
    (slot,) = state.live["b"].slots
    assert point(state, {"a": (0, 6), "plain": (0, 2), "b": (4, 1)})[:10] == [
        *[prompt] * 3,
        *[first] * 2,
        0,
        0,
        0,
        slot,
        0,
    ]
    assert state.report is not None
    assert state.report["keys"] == [state.live["a"].key, None, state.live["b"].key]


def test_chunks_of_a_prompt_and_what_is_computed_again_go_by_true_positions() -> None:
    state = worker()
    begin(state, "a", "warm@prompt", prompt=5)
    slot = state.live["a"].slots[0]
    assert point(state, {"a": (0, 2)})[:3] == [slot, slot, 0]
    assert point(state, {"a": (2, 4)})[:5] == [slot, slot, slot, 0, 0]
    assert point(state, {"a": (6, 1)})[:1] == [0]
    assert point(state, {"a": (0, 7)})[:8] == [slot] * 5 + [0] * 3  # preempted, and computed again as one prefill


def test_what_lies_behind_a_step_is_unsteered_so_padding_is() -> None:
    state = worker()
    begin(state, "a", "warm")
    assert sum(slot > 0 for slot in point(state, {"a": (0, 9)})) == 9
    assert sum(slot > 0 for slot in point(state, {"a": (9, 1)})) == 1
    state.end(["a"])
    begin(state, "plain", None)
    assert sum(point(state, {"plain": (0, 4)})) == 0
    assert state.report is None


def test_a_steady_batch_is_pointed_once_and_reported_every_step() -> None:
    state = worker()
    begin(state, "a", "warm@after:1")
    begin(state, "b", "calm")
    point(state, {"a": (3, 1), "b": (3, 1)})
    assert state.steady is None, "a is not in its last phase yet"
    expected = point(state, {"a": (4, 1), "b": (4, 1)})
    state.token_slots[5] = 7  # shows whether the buffer is written
    assert point(state, {"a": (5, 1), "b": (5, 1)})[:2] == expected[:2]
    assert int(state.token_slots[5]) == 7
    assert state.report is not None
    assert state.report["starts"].tolist() == [5, 5]
    assert point(state, {"b": (6, 1), "a": (6, 1)})[:2] == expected[1::-1], "another order is another step"
    point(state, {"b": (7, 1), "a": (2, 1)})
    assert int(state.token_slots[1]) == 0, "a went back to its prompt"


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_of_steps_equals_asking_every_token(seed: int) -> None:
    """Random batches against the obvious: a fresh worker's idea of each token."""
    chosen = np.random.default_rng(seed)
    texts = ["warm", "warm@prompt", "calm@response", "warm@first:2 + calm", "calm@after:1", None]
    state = worker(slots=16)
    at = {}
    for i in range(6):
        begin(state, str(i), texts[int(chosen.integers(len(texts)))])
        at[str(i)] = 0
    for _ in range(40):
        names = [name for name in at if chosen.random() < 0.8]
        if not names:
            continue
        if chosen.random() < 0.1:
            at[names[0]] = 0
        counts = {name: 3 - at[name] if at[name] < 3 and chosen.random() < 0.7 else 1 for name in names}
        found = point(state, {name: (at[name], counts[name]) for name in names})
        expected = []
        for name in names:
            live = state.live.get(name)
            for position in range(at[name], at[name] + counts[name]):
                phase = max((i for i, edge in enumerate(live.edges) if edge <= position), default=0) if live else 0
                expected.append(live.slots[phase] if live else 0)
            at[name] += counts[name]
        assert found == expected + [0] * (64 - len(expected))


def test_a_request_that_enters_twice_holds_its_rows_once() -> None:
    state = worker(slots=1)
    begin(state, "a", "warm")
    begin(state, "a", "warm")
    state.end(["a", "never seen"])
    begin(state, "b", "calm")
    assert state.state() == {
        "vectors": sorted(vector.digest for vector in VECTORS.values()),
        "rows": 1,
        "rows_held": 1,
        "requests": 1,
        "gated": 0,
        "blocks": {"Linear": "whole"},
    }


def test_a_vector_that_this_worker_lacks_is_an_error_and_never_unsteered() -> None:
    state = worker()
    state.unload(VECTORS["warm"].digest)
    with pytest.raises(RuntimeError, match="has not loaded warm, which request a needs"):
        begin(state, "a", "warm")
    with pytest.raises(RuntimeError, match="did not pass admission"):
        state.begin("b", 3, {"steer": "calm"})


def test_several_api_servers_may_load_the_same_vector_at_once() -> None:
    state, vector = worker(), VECTORS["warm"]
    for _ in range(2):  # both send it before either asks whether it is loaded
        state.start_loading(vector.digest, vector.encode())
    while not state.loaded(vector.digest):
        pass
    state.use(vector.digest)
    assert state.loaded(vector.digest)
    state.use(vector.digest)
    begin(state, "a", "warm")
    state.unload(vector.digest)
    assert not state.loaded(vector.digest)
    with pytest.raises(RuntimeError, match="was not read"):
        state.use(vector.digest)


def test_a_running_request_keeps_its_rows_when_its_vector_is_unloaded() -> None:
    state = worker()
    begin(state, "a", "warm")
    state.unload(VECTORS["warm"].digest)
    slot = point(state, {"a": (0, 1)})[0]
    assert torch.equal(state.table.added[0, slot], VECTORS["warm"].layers[0])


# The runners of vLLM, as far as steering sees them. What the real V1 runner does is tested with real engines; V2 needs
# a GPU, so its side is tested here against what its source says (vllm/v1/worker/gpu/model_runner.py).


class Output:
    """vLLM's ModelRunnerOutput."""

    def __init__(self, requests: list[str]) -> None:
        self.req_ids = requests


@pytest.fixture(autouse=True)
def outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm.v1.outputs")
    module.ModelRunnerOutput = Output  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.v1"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.v1.outputs", module)


class V1:
    """Prepares inputs while its batch holds the requests; answers at once, or with an output that comes later."""

    def __init__(self, state: SteeringWorker, later: bool) -> None:
        self.state, self.later, self.seen = state, later, [0]
        self.input_batch: Any = None

    def execute_model(self, scheduled: Any) -> Any:
        names = list(scheduled.num_scheduled_tokens)
        starts = np.array([scheduled.starts[name] for name in names] + [99])
        self.input_batch = SimpleNamespace(req_ids=names, num_computed_tokens_cpu=starts, num_reqs=len(names))
        self._prepare_inputs(scheduled, np.array(list(scheduled.num_scheduled_tokens.values())))

    def _prepare_inputs(self, scheduled: Any, counts: Any) -> str:
        self.seen = self.state.token_slots[: counts.sum()].tolist()  # the model would run on this
        return "prepared"

    def sample_tokens(self, grammar: Any) -> Any:
        output = Output(self.input_batch.req_ids)
        return SimpleNamespace(_model_runner_output=output) if self.later else output


class V2:
    """Makes a batch in `prepare_inputs`, in an order of its own, and always answers later."""

    def __init__(self, state: SteeringWorker) -> None:
        self.state, self.seen, self.order = state, [0], [""]

    def execute_model(self, scheduled: Any, dummy_run: bool = False) -> Any:
        if not dummy_run:
            batch = self.prepare_inputs(scheduled, None, None, 0)
            self.seen = self.state.token_slots[: batch.num_scheduled_tokens.sum()].tolist()

    def prepare_inputs(self, scheduled: Any, *rest: Any) -> Any:
        self.order = sorted(scheduled.num_scheduled_tokens, key=lambda name: scheduled.num_scheduled_tokens[name])
        return SimpleNamespace(
            req_ids=self.order,
            num_computed_tokens_np=np.array([scheduled.starts[name] for name in self.order]),
            num_scheduled_tokens=np.array([scheduled.num_scheduled_tokens[name] for name in self.order]),
        )

    def sample_tokens(self, grammar: Any) -> Any:
        return SimpleNamespace(model_runner_output=Output(self.order))


def scheduled(
    steps: dict[str, tuple[int, int]],
    new: dict[str, str | None] | None = None,
    finished: set[str] = frozenset(),  # type: ignore[assignment]
) -> Any:
    entering = [
        fakes.request(name, fakes.resolved(text, VECTORS) if text else None) for name, text in (new or {}).items()
    ]
    return SimpleNamespace(
        finished_req_ids=finished,
        scheduled_new_reqs=entering,
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
        num_scheduled_tokens={name: count for name, (_, count) in steps.items()},
        starts={name: start for name, (start, _) in steps.items()},
    )


@pytest.mark.parametrize("kind", ["V1", "V1 later", "V2"])
def test_a_runner_points_before_the_model_runs_and_reports_with_its_output(kind: str) -> None:
    state = worker()
    runner: Any = V2(state) if kind == "V2" else V1(state, kind == "V1 later")
    attach(runner, state, second=kind == "V2")

    def step(one: Any) -> Any:
        runner.execute_model(one)
        found = runner.sample_tokens(None)
        return getattr(found, "_model_runner_output", None) or getattr(found, "model_runner_output", None) or found

    output = step(scheduled({"a": (0, 3), "plain": (0, 1)}, {"a": "warm@prompt", "plain": None}))
    slot = state.live["a"].slots[0]
    assert sorted(runner.seen) == [0, slot, slot, slot]
    assert output.steer["requests"] == output.req_ids
    assert dict(zip(output.steer["requests"], output.steer["keys"], strict=True))["plain"] is None
    step(scheduled({"a": (3, 1), "plain": (1, 1)}))
    assert runner.seen == [0, 0]
    # V2 lets a preempted request enter anew, with its true prompt and all its tokens to compute.
    again = {"a": "warm@prompt"} if kind == "V2" else None
    step(scheduled({"a": (0, 5)}, again))
    assert runner.seen == [slot] * 3 + [0, 0]
    output = step(scheduled({"plain": (2, 1)}, finished={"a"}))
    assert not hasattr(output, "steer")
    assert state.state()["rows_held"] == 0


@pytest.mark.parametrize("kind", ["V1", "V1 later", "V2"])
def test_a_request_whose_vector_is_missing_fails_alone_and_is_reported_until_it_ends(kind: str) -> None:
    state = worker()
    state.unload(VECTORS["calm"].digest)
    runner: Any = V2(state) if kind == "V2" else V1(state, kind == "V1 later")
    attach(runner, state, second=kind == "V2")

    def step(scheduled_step: Any) -> Any:
        runner.execute_model(scheduled_step)
        output = runner.sample_tokens(None)
        output = getattr(output, "_model_runner_output", None) or getattr(output, "model_runner_output", None) or output
        return output.steer

    report = step(scheduled({"a": (0, 3), "b": (0, 3)}, {"a": "calm", "b": "warm"}))
    assert "has not loaded calm, which request a needs" in report["failed"]["a"]
    assert list(report["failed"]) == ["a"]
    report = step(scheduled({"a": (3, 1), "b": (3, 1)}))
    assert list(report["failed"]) == ["a"]
    report = step(scheduled({"b": (4, 1)}, finished={"a"}))
    assert report["failed"] == {}
    assert dict(zip(report["requests"], report["keys"], strict=True))["b"] == state.live["b"].key


def test_dummy_runs_of_the_second_runner_point_nothing() -> None:
    state = worker()
    runner = V2(state)
    attach(runner, state, second=True)
    runner.execute_model(scheduled({}), dummy_run=True)
    assert state.report is None


@pytest.mark.parametrize("second", [False, True])
def test_a_runner_that_is_not_known_is_refused_with_what_it_lacks(second: bool) -> None:
    runner = SimpleNamespace(execute_model=print)
    needed = "prepare_inputs" if second else "_prepare_inputs"
    with pytest.raises(
        RuntimeError, match=f"the V{1 + second} model runner SimpleNamespace has no sample_tokens, {needed}"
    ):
        attach(runner, worker(), second=second)


@pytest.mark.parametrize("second", [False, True])
def test_a_fault_of_one_worker_alone_ends_an_engine_of_several_and_one_request_of_a_single(
    second: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for workers in (1, 2):
        state = worker()
        runner: Any = V2(state) if second else V1(state, False)
        runner.parallel_config = SimpleNamespace(world_size=workers)
        attach(runner, state, second=second)
        monkeypatch.setattr(SlotTable, "_copy", raising(MemoryError("the device is full")))
        if workers == 2:
            with pytest.raises(SystemExit):  # vLLM catches exceptions of a worker, and goes on
                runner.execute_model(scheduled({"a": (0, 3)}, {"a": "warm"}))
        else:
            runner.execute_model(scheduled({"a": (0, 3)}, {"a": "warm"}))
            assert state.failed == {"a": "the device is full"}
            assert len(state.table.free) == 8


def raising(error: Exception) -> Any:
    def fault(*args: Any) -> None:
        raise error

    return fault


@pytest.mark.parametrize("seed", range(10))
def test_workers_of_one_engine_fail_the_same_requests(seed: int) -> None:
    """Two stages of a pipeline go through the same steps and calls, with faults of requests among them."""
    chosen = np.random.default_rng(seed)
    stages = [worker(slots=4, layers=layers) for layers in ((0, 1), (2, 3))]
    runners: list[Any] = [V1(state, False) for state in stages]
    for runner, state in zip(runners, stages, strict=True):
        runner.parallel_config = SimpleNamespace(world_size=2)
        attach(runner, state, second=False)
    texts = ["warm", "calm@response", "ablate(warm[0]) + ablate(calm[0]) + ablate(formal[0])", "1e39*warm", "2*formal"]
    texts += ["warm@prompt + calm@first:2 + formal@after:1", "clamp(calm, 2)"]
    running: list[str] = []
    failed = 0
    for step in range(60):
        digest = VECTORS[str(chosen.choice(sorted(VECTORS)))].digest
        for state in stages:
            if step % 7 == 3:
                state.unload(digest)
            elif step % 7 == 5:
                content = next(v.encode() for v in VECTORS.values() if v.digest == digest)
                state.start_loading(digest, content)
                while not state.loaded(digest):
                    pass
                state.use(digest)
        new = {f"r{step}": texts[int(chosen.integers(len(texts)))]} if chosen.random() < 0.8 else {}
        if chosen.random() < 0.1:
            new[f"bad{step}"] = None
        finished = {name for name in running if chosen.random() < 0.3}
        running = [name for name in running if name not in finished] + list(new)
        counts = {name: (0, 3) if name in new else (5, 1) for name in running}
        if not counts:
            continue
        for runner in runners:
            runner.execute_model(scheduled(counts, new, finished))
        one, other = stages
        assert one.failed == other.failed
        assert {n: (live.key, live.slots) for n, live in one.live.items()} == {
            n: (live.key, live.slots) for n, live in other.live.items()
        }
        failed += len(one.failed)
    assert failed
