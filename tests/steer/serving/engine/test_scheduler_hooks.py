"""Requests that can't be steered end with an error each, and leave nothing in the prefix cache; the others go on."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import fakes
import pytest

from steer.serving.engine import scheduler_hooks
from steer.serving.engine.admission import Admission
from steer.serving.engine.resolved import GIVEN
from steer.serving.settings import Settings

VECTORS = fakes.vectors()


class Batch:
    def __init__(self, outputs: list[Any]) -> None:
        self.outputs = outputs


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What of vLLM's is imported."""
    for name in ("vllm", "vllm.v1", "vllm.v1.request", "vllm.v1.engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm.v1.request"].RequestStatus = SimpleNamespace(FINISHED_ERROR="error")  # type: ignore[attr-defined]
    engine: Any = sys.modules["vllm.v1.engine"]
    engine.EngineCoreOutputs = Batch
    engine.EngineCoreOutput = lambda name, tokens, finish_reason: SimpleNamespace(
        request_id=name, new_token_ids=tokens, finish_reason=finish_reason, finished=True
    )


class Scheduler:
    """vLLM's, as far as it is used."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(additional_config={"steer": {"rows": 4}})
        self.requests: dict[str, Any] = {}
        self.evicted: set[int] = set()
        self.kv_cache_manager = SimpleNamespace(
            get_block_ids=lambda name: ([ord(name)], [ord(name) + 1000]), evict_blocks=self.evicted.update
        )

    def enter(self, request: Any) -> None:
        scheduler_hooks.add_request(lambda self, r: self.requests.update({r.request_id: r}), self, request)

    def finish_requests(self, names: set[str], status: str) -> list[Any]:
        ended = [self.requests.pop(name) for name in sorted(names)]
        for request in ended:
            scheduler_hooks.free_request(lambda self, request: (None, None), self, request)
            request.get_finished_reason = lambda: status
        return ended

    def step(self, report: Any, *names: str) -> dict[Any, Any]:
        scheduled = SimpleNamespace(num_scheduled_tokens=dict.fromkeys(names, 1))
        output = SimpleNamespace(**({"steer": report} if report else {}))

        def original(self: Any, scheduled: Any, output: Any) -> dict[Any, Any]:
            outputs = [SimpleNamespace(request_id=name, finished=False) for name in names if name in self.requests]
            return {0: Batch(outputs)}

        return scheduler_hooks.update_from_output(original, self, scheduled, output)


def report(failed: dict[str, str], **keys: str | None) -> dict[str, Any]:
    return {"requests": list(keys), "keys": list(keys.values()), "starts": [0] * len(keys), "failed": failed}


def request(name: str, expression: str) -> Any:
    found = fakes.request(name, fakes.resolved(expression, VECTORS))
    found.client_index = 0
    return found


def test_a_failed_request_ends_with_an_error_and_its_blocks_leave_the_prefix_cache() -> None:
    scheduler = Scheduler()
    for entering in (request("a", "warm"), request("b", "calm"), request("c", "warm")):
        scheduler.enter(entering)
    key = fakes.resolve("calm", VECTORS).key
    outputs = scheduler.step(report({"a": "lacks warm"}, a=None, b=key, c=None), "a", "b", "c")
    reasons = {one.request_id: getattr(one, "finish_reason", None) for one in outputs[0].outputs}
    assert reasons == {"b": None, "a": "error", "c": "error"}, "c may have found a's keys and values"
    assert scheduler.evicted == {97, 1097, 99, 1099}
    assert set(scheduler.requests) == {"b"}
    assert scheduler_hooks.capacity_of(scheduler).held == 1


def test_requests_that_ran_without_their_composition_fail_and_the_others_go_on() -> None:
    keys = {text: fakes.resolve(text, VECTORS).key for text in ("warm", "calm")}
    for told in (None, report({}, a=None, b=keys["calm"]), report({}, a=keys["calm"], b=keys["calm"])):
        scheduler = Scheduler()
        for entering in (request("a", "warm"), request("b", "calm"), fakes.request("c")):
            scheduler.enter(entering)
        outputs = scheduler.step(told, "a", "b", "c")
        failed = {one.request_id for one in outputs[0].outputs if getattr(one, "finish_reason", None) == "error"}
        assert failed == ({"a", "b"} if told is None else {"a"})
        assert set(scheduler.requests) == {"a", "b", "c"} - failed
        assert scheduler_hooks.capacity_of(scheduler).held == (0 if told is None else 1)


def test_requests_that_wait_for_the_next_step_enter_before_it_is_scheduled() -> None:
    class Waiting(Scheduler):
        def add_request(self, request: Any) -> None:
            self.requests[request.request_id] = request

    original = Waiting.add_request
    Waiting.add_request = lambda self, request: scheduler_hooks.add_request(original, self, request)  # type: ignore[method-assign]
    Waiting.add_request.__wrapped__ = original  # type: ignore[attr-defined]
    scheduler = Waiting()
    scheduler.vllm_config.additional_config["steer"]["rows"] = 100
    for i in range(10):
        scheduler.add_request(request(str(i), " + ".join(f"clamp(warm, {i + 1})@after:{j}" for j in range(8))))
    seen = []
    while len(scheduler.requests) < 10:
        before = len(scheduler.requests)
        scheduler_hooks.schedule(lambda self: seen.append(len(self.requests)), scheduler)
        assert len(scheduler.requests) > before
    assert seen[-1] == 10, "they are there when the step is scheduled"


def test_a_request_that_did_not_pass_admission_fails_and_not_the_engine() -> None:
    scheduler = Scheduler()
    strange = fakes.request("a", {"steer": "warm"})
    strange.client_index = 3
    scheduler.enter(strange)
    outputs = scheduler.step(None, "a")
    assert [(one.request_id, one.finish_reason) for one in outputs[3].outputs] == [("a", "error")]
    assert scheduler.requests == {}


def hasher(hash_block_size: int) -> Callable[[Any], list[bytes]]:
    """Hashes of the new whole blocks of a request, as vLLM computes them."""

    def block_hasher(request: Any) -> list[bytes]:
        new: list[bytes] = []
        for end in range((len(request.block_hashes) + 1) * hash_block_size, len(request.tokens) + 1, hash_block_size):
            before = (request.block_hashes + new)[-1:]
            tokens = request.tokens[end - hash_block_size : end]
            new.append(hashlib.sha256(repr((before or request.cache_salt, tokens)).encode()).digest())
        return new

    return block_hasher


def hashed(
    steer: str | None, prompt: list[int], response: list[int], salt: str | None = None, given: int = 0
) -> list[bytes]:
    """The hashes of blocks of 4 tokens, while the response grows a token at a time, as admission has salted them.

    The last `given` tokens of the prompt are a response that is only scored.
    """
    found = Admission(Settings(fakes.vectors()), fakes.HIDDEN, fakes.LAYERS, None)
    extra = {**({"steer": steer} if steer else {}), **({GIVEN: given} if given else {})}
    request = fakes.request("a", extra or None, prompt=prompt, block_hashes=[], tokens=[*prompt])
    request.cache_salt, request._block_hasher = salt, hasher(4)
    found.admit(request)

    def original(self: Any) -> None:
        self.block_hashes.extend(self._block_hasher(self))

    for token in (None, *response):
        request.tokens += [] if token is None else [token]
        scheduler_hooks.update_block_hashes(original, request)
    return request.block_hashes


@pytest.mark.parametrize("salt", [None, "a client's"])
@pytest.mark.parametrize("length", range(1, 14))
def test_the_blocks_of_prompts_are_shared_where_prompts_are_steered_equally_and_those_of_responses_are_not(
    length: int, salt: str | None
) -> None:
    prompt, response = list(range(length)), list(range(50, 70))
    blocks = length // 4
    plain, warm = hashed(None, prompt, response, salt), hashed("warm", prompt, response, salt)
    texts = ["warm@response", "2*warm@response", "calm@after:3"]
    alone, again, late = (hashed(text, prompt, response, salt) for text in texts)
    assert [a == b for a, b in zip(plain, alone, strict=True)] == [i < blocks for i in range(len(plain))]
    assert [a == b for a, b in zip(again, late, strict=True)] == [i < blocks for i in range(len(plain))]
    both = hashed("warm + calm@response", prompt, response, salt)
    assert [a == b for a, b in zip(warm, both, strict=True)] == [i < blocks for i in range(len(plain))]
    assert alone == hashed("warm@response", prompt, response, salt)
    # The same tokens as a longer prompt: what was a response is none now.
    longer = hashed("warm@response", [*prompt, *response], [], salt)
    assert [a == b for a, b in zip(alone, longer, strict=True)] == [i < blocks for i in range(len(plain))]
    assert longer == plain
    assert hashed("warm@response", [*prompt, *response], [], salt, given=len(response)) == alone
    others = hashed("warm@response", prompt, response, "another's")
    assert not set(others) & set(alone)


def test_where_vllm_does_not_show_the_size_of_a_block_no_prompt_is_shared() -> None:
    request = fakes.request("a", fakes.resolved("warm@response", fakes.vectors()), prompt=range(8))
    request.sampling_params.extra_args["steer_resolved"]["prompt_salt"] = None
    request._block_hasher = lambda _request: [b"1", b"2"]
    request.cache_salt, request.block_hashes = "own", []
    scheduler_hooks.update_block_hashes(lambda self: self.block_hashes.extend(self._block_hasher(self)), request)
    assert request.block_hashes == [b"1", b"2"]
    assert request.steer_prompt is None
