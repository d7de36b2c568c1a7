"""The joins in the core process: before vLLM's scheduler, requests wait for free slots."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from steer.serving.engine.capacity import Capacity
from steer.serving.settings import NAME

logger = logging.getLogger("vllm.steer")  # below vLLM's own, so that its log shows it

RECEIPT = "steer"  # where the receipt travels to the front end: a key of vLLM's kv_transfer_params


def capacity_of(scheduler: Any) -> Capacity:
    """The slots that a scheduler's requests may hold, made at first use."""
    capacity: Capacity | None = getattr(scheduler, "steer_capacity", None)
    if capacity is None:
        capacity = scheduler.steer_capacity = Capacity(scheduler.vllm_config.additional_config[NAME]["rows"])
    return capacity


def add_request(original: Callable[..., Any], self: Any, request: Any) -> None:
    """A steered request goes on when there is room for its composition."""
    try:
        ready = capacity_of(self).enter(request)
    except RuntimeError as error:  # it did not pass admission: it fails, and not the engine
        capacity_of(self).failed[request.request_id] = str(error)
        ready = True
    if ready:
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
    report = getattr(output, "steer", None)
    ended = _fail(self, capacity.fail((report or {}).get("failed", {}))) if report or capacity.failed else []
    if capacity.progress:
        capacity.record(scheduled.num_scheduled_tokens, report)
    outputs = original(self, scheduled, output)
    _answer(outputs, ended)
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


def _fail(scheduler: Any, failed: dict[str, str]) -> list[Any]:
    """End requests that could not be steered, before what they computed is looked at; returns those that lived."""
    failed = {name: why for name, why in failed.items() if name in scheduler.requests}
    if not failed:
        return []
    from vllm.v1.request import RequestStatus

    for name, why in failed.items():
        logger.error("request %s has failed: %s", name, why)
        # Their keys and values were computed unsteered: nobody may find them under the composition's salt.
        block_ids = scheduler.kv_cache_manager.get_block_ids(name)
        scheduler.kv_cache_manager.evict_blocks({block for group in block_ids for block in group})
    ended: list[Any] = scheduler.finish_requests(set(failed), RequestStatus.FINISHED_ERROR)
    return ended


def _answer(outputs: dict[int, Any], ended: Iterable[Any]) -> None:
    """Tell the front end of requests that have failed, as vLLM's scheduler does of its own."""
    for request in ended:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

        batch = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
        reason = request.get_finished_reason()
        batch.outputs.append(EngineCoreOutput(request.request_id, [], finish_reason=reason))


def _outputs(found: dict[int, Any]) -> Iterable[Any]:
    return (one for batch in found.values() for one in batch.outputs)


def _add(scheduler: Any, request: Any) -> None:
    """Give a request to the scheduler itself, without waiting for slots."""
    type(scheduler).add_request.__wrapped__(scheduler, request)
