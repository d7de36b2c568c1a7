"""Any JSON value in any field of a request on any route: it is answered or refused, and never served unsteered."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import hypothesis.strategies as st
import pytest
import route_trial
from hypothesis import example, given, settings
from starlette.applications import Starlette
from starlette.routing import Route

from steer.serving.http.fields import resembles_steer
from steer.serving.http.middleware import Middleware
from steer.serving.http.routes import KINDS, Kind

ROUTES = [path for (method, path), kind in KINDS.items() if kind is not Kind.OTHER and method == "POST"]
ROUTES.append("/a/route/of/tomorrow")

words = st.sampled_from(
    ["steer", "warm", "2*warm", "model", "model:friendly", "model:none", "steer_resolved", "a:b", ":"]
)
keys = st.sampled_from(
    ["vllm_xargs", "model", "steer", "Steering", "stear", "extra_body", "sampling_params", "extra_args", "messages"]
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=8)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | st.text(max_size=6), inner, max_size=4)
)
fields = {
    "model": st.just("model") | values,
    "vllm_xargs": st.dictionaries(keys, values, max_size=2) | values,
    "use_beam_search": values,
    "sampling_params": values,
    "extra_body": values,
    "steer": values,
}
bodies = st.fixed_dictionaries({}, optional=fields) | values  # type: ignore[type-var]


def app() -> Any:
    routes = [Route(path, route_trial.handler, methods=["POST"]) for path in ROUTES]
    for route in routes:
        route.app = route_trial.handler
    built = Starlette(routes=routes)
    built.add_middleware(Middleware, find=route_trial.serving, routes=lambda: routes)  # type: ignore[arg-type]
    return built


APP = app()


def asks_for_steering(value: Any) -> bool:
    """Whether a request names an arm, or an expression where vLLM reads it; written apart from the code under test."""
    if not isinstance(value, dict):
        return False
    extra = value.get("vllm_xargs")
    return value.get("model") in ("model:friendly", "model:none") or (isinstance(extra, dict) and "steer" in extra)


@settings(max_examples=400)
@given(st.sampled_from(ROUTES), bodies)
@example("/v1/completions", {"model": "model", "vllm_xargs": {"steer": "warm", "steer_resolved": {}}})
@example("/v1/completions", {"model": "model:\ud800"})
@example("/v1/completions", {"model": "model:" + "x" * 10_000})
@example("/v1/completions", {"model": "model", "vllm_xargs": {"steer": ["x"] * 10_000}})
@example("/v1/completions", {"model": "model", "vllm_xargs": {"steer": "x" * 10_000}})
@example("/v1/completions", {"model": "model", "vllm_xargs": {"steer" + "x" * 10_000: 1}})
@example("/v1/completions", {"model": "model:friendly", "vllm_xargs": {"steer": "x" * 10_000}})
@example("/invocations", {"steer" + "x" * 10_000: 1})
@example("/v1/completions", {"model": "model:friendly", "vllm_xargs": {"\ud800": 1}})
def test_any_json_in_any_field_is_answered_or_refused(path: str, value: Any) -> None:
    status, content = asyncio.run(route_trial.ask(APP, "POST", path, json.dumps(value).encode()))
    answer = json.loads(content)
    kind = KINDS.get(("POST", path), Kind.REFUSED)
    if "reached" not in answer:
        assert status in (400, 404), content
        assert {"message", "type", "param", "code"} <= answer["error"].keys()
        assert len(content) < 2000
        return
    assert status == 200
    reached = json.loads(answer["reached"])
    if kind is Kind.STEERED:
        assert ("steer" in answer) is asks_for_steering(value)
        if "steer" in answer:
            assert reached["model"] != "model:friendly"
            assert isinstance(reached["vllm_xargs"]["steer"], str)
        elif isinstance(value, dict):
            assert not any(resembles_steer(key) for key in value)
    elif kind is Kind.REFUSED:
        assert not asks_for_steering(value)
        assert "steer" not in answer


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 10_000, b"1" * 5000, b'{"a": 1e999}', b'"\\ud800"'])
def test_bytes_that_are_no_json_reach_vllm_as_they_are(path: str, content: bytes) -> None:
    status, answer = asyncio.run(route_trial.ask(APP, "POST", path, content))
    assert (status, json.loads(answer)["reached"].encode("latin-1")) == (200, content)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        *(
            (key, True)
            for key in ("stear", "Steer", "STEER", "steering", "steers", "ster", "stere", "tseer", "stearing")
        ),
        *((key, True) for key in ("steer_vector", "vllm_steer", "x-steer", "steer ", "s-t-e-e-r")),
        *(
            (key, False)
            for key in ("stream", "seed", "stop", "steps", "session_id", "temperature", "target", "user", "")
        ),
    ],
)
def test_keys_near_ours_are_told_from_others(key: str, near: bool) -> None:
    assert resembles_steer(key) is near
