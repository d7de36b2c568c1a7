"""Prometheus metrics beside vLLM's, under `steer:`. The labels are arms, never expressions
or users, so there are few time series.
"""

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
    gates: Any


_METRICS: list[_Metrics] = []
ARMS = 1000  # most arms with a label of their own
_LABELS: set[str] = set()


def get() -> _Metrics:
    """The metrics, made at first use: prometheus_client can register a name only once per process."""
    if not _METRICS:
        from prometheus_client import Counter, Gauge

        # Over the API servers of one deployment, running requests are summed; of other gauges the latest value counts.
        several = {"multiprocess_mode": "sum"}
        last = {"multiprocess_mode": "mostrecent"}
        _METRICS.append(
            _Metrics(
                Counter("steer:requests", "Steered requests that have ended, by arm and outcome.", ["arm", "outcome"]),
                Counter("steer:tokens", "Tokens of steered requests that the model computed.", ["arm", "part"]),
                Counter("steer:refused", "Requests refused at admission, by reason.", ["reason"]),
                Gauge("steer:requests_running", "Steered requests that are running, by arm.", ["arm"], **several),
                Gauge("steer:rows", "Slots for compositions, in total.", **last),
                Gauge("steer:rows_held", "Slots that running requests hold.", **last),
                Gauge("steer:requests_waiting_for_rows", "Requests that wait for a free slot.", **last),
                Gauge("steer:vectors", "Vectors that have a name.", **last),
                Counter(
                    "steer:gate",
                    "Decisions of gates, by probe: one for a request (@when), or one for each token (@while).",
                    ["probe", "decision"],
                ),
            )
        )
    return _METRICS[0]


def began(request: HttpRequest | None) -> None:
    """Count a steered request that begins."""
    get().running.labels(arm_of(request)).inc()


def ended(request: HttpRequest | None, receipt: dict[str, Any] | None) -> None:
    """Count a steered request that ends: with its receipt when it is done, None when it was aborted."""
    metrics, arm = get(), arm_of(request)
    metrics.running.labels(arm).dec()
    metrics.requests.labels(arm, "done" if receipt is not None else "aborted").inc()
    for part in ("prompt", "response") if receipt is not None else ():
        assert receipt is not None
        metrics.tokens.labels(arm, part).inc(receipt[f"{part}_tokens"])
    for gate in (receipt or {}).get("gates", ()):
        # Names of probes are those of vectors, of which a server has a bounded number at a time, not in all.
        probe = _label(gate["probe"])
        metrics.gates.labels(probe, "open").inc(gate["held"])
        metrics.gates.labels(probe, "closed").inc(gate["read"] - gate["held"])


def refused(reason: str) -> None:
    """Count a request that was refused at admission."""
    get().refused.labels(reason).inc()


def capacity(state: dict[str, int]) -> None:
    """Set the gauges of slots from the engine core's state, which comes with every receipt."""
    metrics = get()
    metrics.rows.set(state["rows"])
    metrics.rows_held.set(state["rows_held"])
    metrics.waiting.set(state["waiting"])


def arm_of(request: HttpRequest | None) -> str:
    """The label of a request: its arm's name, or `expression` for a request with an expression of its own.

    Arms can be added without end while a server runs; behind the first `ARMS` names, others share the label `other`.
    """
    return _label((request.arm if request is not None else None) or "expression")


def _label(name: str) -> str:
    """A label for a name; behind the first `ARMS` names, others share one."""
    if name not in _LABELS and len(_LABELS) < ARMS:
        _LABELS.add(name)
    return name if name in _LABELS else "other"
