"""Prometheus metrics of experiments. Labels are names of the experiment's file, never units or texts of clients."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from steer.serving.http.experiments import Exposed

if TYPE_CHECKING:
    from steer.experiments.running.live import Live


INTERVAL = 1.0  # seconds between two settings of the gauges


class _Metrics(NamedTuple):
    exposures: Any
    feedback: Any
    waiting: Any
    dropped: Any


_METRICS: list[_Metrics] = []


def get() -> _Metrics:
    """The metrics, made at first use: prometheus_client can register a name only once per process."""
    if not _METRICS:
        from prometheus_client import Counter, Gauge

        exposure, feedback, one = ["experiment", "arm", "reason"], ["experiment", "metric"], ["experiment"]
        _METRICS.append(
            _Metrics(
                Counter("steer:exposures", "Answers of an experiment, by arm and why it was served.", exposure),
                Counter("steer:feedback", "Feedback about answers of an experiment, by metric.", feedback),
                Gauge(
                    "steer:log_waiting", "Rows that wait for the log of an experiment.", one, multiprocess_mode="sum"
                ),
                Gauge("steer:log_dropped", "Rows that no log could take.", one, multiprocess_mode="sum"),
            )
        )
    return _METRICS[0]


def recorded(exposed: Exposed) -> None:
    """Count a recorded answer."""
    _exposures(exposed.live.experiment.name, exposed.decision.arm.name, exposed.decision.reason).inc()


@functools.cache
def _exposures(experiment: str, arm: str, reason: str) -> Any:
    """The counter with these labels, which are as few as arms and reasons."""
    return get().exposures.labels(experiment, arm, reason)


def received(live: Live, metric: str) -> None:
    """Count feedback; metrics that the experiment does not know share a label."""
    label = metric if metric in live.experiment.metrics() else "other"
    get().feedback.labels(live.experiment.name, label).inc()


async def follow(lives: Mapping[str, Live]) -> None:
    """Set the gauges of logs every second. Ends with the task."""
    while True:
        for name, live in lives.items():
            now = live.writer.state()
            get().waiting.labels(name).set(now.waiting)
            get().dropped.labels(name).set(now.dropped)
        await asyncio.sleep(INTERVAL)
