"""The joins in the core process: before vLLM's scheduler, requests wait for free slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from steer.serving.engine.capacity import Capacity
from steer.serving.settings import NAME

RECEIPT = "steer"  # where the receipt travels to the front end: a key of vLLM's kv_transfer_params


def capacity_of(scheduler: Any) -> Capacity:
    """The slots that a scheduler's requests may hold, made at first use."""
    capacity: Capacity | None = getattr(scheduler, "steer_capacity", None)
    if capacity is None:
        capacity = scheduler.steer_capacity = Capacity(scheduler.vllm_config.additional_config[NAME]["rows"])
    return capacity


def add_request(original: Callable[..., Any], self: Any, request: Any) -> None:
    """A steered request goes on when there is room for its composition."""
    if capacity_of(self).enter(request):
        original(self, request)


def free_request(original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """A request ends: its receipt goes along, and those who waited for its slots go on."""
    kv_transfer, other = original(self, request, *args, **kwargs)
    capacity = capacity_of(self)
    receipt = capacity.leave(request.request_id)
    for ready in capacity.next_in():
        _add(self, ready)
    if receipt is not None:
        kv_transfer = {**(kv_transfer or {}), RECEIPT: {**receipt, "capacity": capacity.state()}}
    return kv_transfer, other


def finish_requests(original: Callable[..., Any], self: Any, request_ids: Any, status: Any) -> Any:
    """An abort from outside also reaches requests that wait for slots: the scheduler takes them in, and ends them."""
    if capacity_of(self).waiting:
        if isinstance(request_ids, str):
            request_ids = (request_ids,)
        request_ids = None if request_ids is None else set(request_ids)
        for request in capacity_of(self).withdraw(request_ids):
            _add(self, request)
    return original(self, request_ids, status)


def update_from_output(original: Callable[..., Any], self: Any, scheduled: Any, output: Any) -> Any:
    """Take in what the step applied, before requests end on it."""
    capacity = capacity_of(self)
    if capacity.progress:
        capacity.record(scheduled.num_scheduled_tokens, getattr(output, "steer", None))
    outputs = original(self, scheduled, output)
    if capacity.stops:
        # The front end, not the engine, sees a stop string: the receipt so far must be there when it does.
        for one in _outputs(outputs):
            if one.request_id in capacity.stops and not one.finished:
                receipt = {**capacity.receipt(capacity.progress[one.request_id]), "capacity": capacity.state()}
                one.kv_transfer_params = {**(one.kv_transfer_params or {}), RECEIPT: receipt}
    return outputs


def get_request_counts(original: Callable[..., Any], self: Any) -> tuple[int, int]:
    """(running, waiting), with those that wait for slots among the waiting."""
    running, waiting = original(self)
    return running, waiting + len(capacity_of(self).waiting)


def _outputs(found: dict[int, Any]) -> Iterable[Any]:
    return (one for batch in found.values() for one in batch.outputs)


def _add(scheduler: Any, request: Any) -> None:
    """Give a request to the scheduler itself, without waiting for slots."""
    type(scheduler).add_request.__wrapped__(scheduler, request)
