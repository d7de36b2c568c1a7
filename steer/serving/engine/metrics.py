"""Prometheus metrics beside vLLM's, under `steer:`. Labels are arms, never expressions or users: they stay few."""

from __future__ import annotations

from typing import Any, NamedTuple

from steer.serving.engine.receipts import HttpRequest


class _Metrics(NamedTuple):
    requests: Any
    tokens: Any
    refused: Any
    running: Any
    rows: Any
    rows_held: Any
    waiting: Any
    vectors: Any


_METRICS: list[_Metrics] = []


def get() -> _Metrics:
    """The metrics, made at first use, because prometheus_client registers a name only once a process."""
    if not _METRICS:
        from prometheus_client import Counter, Gauge

        # Several API servers of one deployment sum their gauges, as vLLM's own do.
        several = {"multiprocess_mode": "sum"}
        last = {"multiprocess_mode": "mostrecent"}
        _METRICS.append(
            _Metrics(
                Counter("steer:requests", "Steered requests that ended, by arm and outcome.", ["arm", "outcome"]),
                Counter("steer:tokens", "Tokens that went through the model steered.", ["arm", "part"]),
                Counter("steer:refused", "Requests refused at admission, by reason.", ["reason"]),
                Gauge("steer:requests_running", "Steered requests under way.", ["arm"], **several),
                Gauge("steer:rows", "Slots for compositions.", **last),
                Gauge("steer:rows_held", "Slots that live requests hold.", **last),
                Gauge("steer:requests_waiting_for_rows", "Requests that wait for a free slot.", **last),
                Gauge("steer:vectors", "Vectors that have a name.", **last),
            )
        )
    return _METRICS[0]


def began(request: HttpRequest | None) -> None:
    """A steered request is under way."""
    get().running.labels(arm_of(request)).inc()


def ended(request: HttpRequest | None, receipt: dict[str, Any] | None) -> None:
    """A steered request is done, with its receipt, or aborted, without one."""
    found, arm = get(), arm_of(request)
    found.running.labels(arm).dec()
    found.requests.labels(arm, "done" if receipt is not None else "aborted").inc()
    for part in ("prompt", "response") if receipt is not None else ():
        assert receipt is not None
        found.tokens.labels(arm, part).inc(receipt[f"{part}_tokens"])


def refused(reason: str) -> None:
    """A request was refused at admission."""
    get().refused.labels(reason).inc()


def capacity(state: dict[str, int]) -> None:
    """The engine core's figures, as they came with a receipt."""
    found = get()
    found.rows.set(state["rows"])
    found.rows_held.set(state["rows_held"])
    found.waiting.set(state["waiting"])


def arm_of(request: HttpRequest | None) -> str:
    """The label: the arm's name, or `expression` for a request that brought its own."""
    return (request.arm if request is not None else None) or "expression"
