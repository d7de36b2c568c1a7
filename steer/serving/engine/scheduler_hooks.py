"""The hooks in vLLM's scheduler: requests wait for free slots before the scheduler sees them."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

from steer.serving.engine.capacity import Capacity
from steer.serving.engine.resolved import PROMPT_SALT, RESOLVED, prompt_length
from steer.serving.settings import NAME

logger = logging.getLogger("vllm.steer")  # a child of vLLM's logger, so that vLLM's log shows it

RECEIPT = "steer"  # the key in vLLM's kv_transfer_params that carries the receipt to the front end


def capacity_of(scheduler: Any) -> Capacity:
    """The capacity of a scheduler, made at first use."""
    capacity: Capacity | None = getattr(scheduler, "steer_capacity", None)
    if capacity is None:
        capacity = scheduler.steer_capacity = Capacity(scheduler.vllm_config.additional_config[NAME]["rows"])
    return capacity


def add_request(original: Callable[..., Any], self: Any, request: Any) -> None:
    """Pass a request to the scheduler, or queue it until there are slots for its composition."""
    try:
        ready = capacity_of(self).enter(request)
    except RuntimeError as error:  # the request did not pass admission: it alone fails, not the engine
        capacity_of(self).failed[request.request_id] = str(error)
        ready = True
    if ready:
        original(self, request)


def schedule(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Before a step: pass on requests that waited only because the previous step had enough slots to write."""
    for ready in capacity_of(self).next_step():
        _add(self, ready)
    return original(self, *args, **kwargs)


def free_request(original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """Send the receipt of a request that ends, and pass on requests that waited for its slots."""
    kv_transfer, other = original(self, request, *args, **kwargs)
    capacity = capacity_of(self)
    receipt = capacity.leave(request.request_id)
    for ready in capacity.next_in():
        _add(self, ready)
    if receipt is not None:
        kv_transfer = {**(kv_transfer or {}), RECEIPT: {**receipt, "capacity": capacity.state()}}
    return kv_transfer, other


def finish_requests(original: Callable[..., Any], self: Any, request_ids: Any, status: Any) -> Any:
    """Let aborts also reach requests that wait for slots: they are passed to the scheduler, which ends them."""
    if capacity_of(self).waiting:
        if isinstance(request_ids, str):
            request_ids = (request_ids,)
        request_ids = None if request_ids is None else set(request_ids)
        for request in capacity_of(self).withdraw(request_ids):
            _add(self, request)
    return original(self, request_ids, status)


def update_from_output(original: Callable[..., Any], self: Any, scheduled: Any, output: Any) -> Any:
    """Record what the step applied, before the scheduler ends requests on its output."""
    capacity = capacity_of(self)
    report = getattr(output, "steer", None)
    failed = capacity.record(scheduled.num_scheduled_tokens, report)
    ended = _fail(self, capacity.fail(failed)) if failed or capacity.failed else []
    outputs = original(self, scheduled, output)
    _answer(outputs, ended)
    if capacity.stops:
        # The front end finds stop strings, and may end the request at this step: it needs the receipt so far.
        for step in _outputs(outputs):
            if step.request_id in capacity.stops and not step.finished:
                receipt = {**capacity.receipt(capacity.progress[step.request_id]), "capacity": capacity.state()}
                step.kv_transfer_params = {**(step.kv_transfer_params or {}), RECEIPT: receipt}
    return outputs


def update_block_hashes(original: Callable[..., Any], self: Any) -> None:
    """Hash the blocks of a prompt so that they are shared with all prompts that are steered equally.

    vLLM's hash of a block covers the one before it, and the first covers the request's salt. The salt of a composition
    that acts on responses otherwise than on prompts is that of its responses (`admission`). Here the blocks that lie
    whole in the prompt get the salt of the prompt, and the first block behind them follows a hash with the other salt.
    """
    if "steer_prompt" not in self.__dict__:
        self.steer_prompt = _blocks_of_prompt(self)
    if self.steer_prompt is None:
        original(self)
        return
    blocks, salt = self.steer_prompt
    hashes = self.block_hashes
    if len(hashes) < blocks:
        own, self.cache_salt = self.cache_salt, salt
        original(self)
        self.cache_salt = own
        del hashes[blocks:]
    if len(hashes) == blocks:
        last, hashes[-1] = hashes[-1], hashlib.sha256(hashes[-1] + self.cache_salt.encode()).digest()
        original(self)
        hashes[blocks - 1] = last
    elif len(hashes) > blocks:
        original(self)


def _blocks_of_prompt(request: Any) -> tuple[int, str | None] | None:
    """The number of blocks that lie whole in a request's prompt, and their salt; None where its own salt is theirs."""
    parameters = request.sampling_params
    values = ((parameters.extra_args if parameters is not None else None) or {}).get(RESOLVED)
    if not isinstance(values, dict) or PROMPT_SALT not in values or request._block_hasher is None:
        return None
    # Blocks are hashed by a function of vLLM's that knows their size; where it is not seen, nothing is shared.
    size = inspect.getclosurevars(request._block_hasher).nonlocals.get("hash_block_size")
    blocks = prompt_length(request) // size if isinstance(size, int) and size > 0 else 0
    return (blocks, values[PROMPT_SALT]) if blocks else None


def get_request_counts(original: Callable[..., Any], self: Any) -> tuple[int, int]:
    """The numbers of (running, waiting) requests; those that wait for slots count as waiting."""
    running, waiting = original(self)
    return running, waiting + len(capacity_of(self).waiting)


def _fail(scheduler: Any, failed: dict[str, str]) -> list[Any]:
    """End requests that could not be steered, before their output is read; return those that the scheduler had."""
    failed = {name: why for name, why in failed.items() if name in scheduler.requests}
    if not failed:
        return []
    from vllm.v1.request import RequestStatus

    for name, why in failed.items():
        logger.error("request %s has failed: %s", name, why)
        # Their keys and values were computed unsteered: no request may reuse them under the composition's salt.
        block_ids = scheduler.kv_cache_manager.get_block_ids(name)
        scheduler.kv_cache_manager.evict_blocks({block for group in block_ids for block in group})
    ended: list[Any] = scheduler.finish_requests(set(failed), RequestStatus.FINISHED_ERROR)
    return ended


def _answer(outputs: dict[int, Any], ended: Iterable[Any]) -> None:
    """Add an output for each failed request, as vLLM's scheduler does for requests that it fails itself."""
    for request in ended:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

        batch = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
        reason = request.get_finished_reason()
        batch.outputs.append(EngineCoreOutput(request.request_id, [], finish_reason=reason))


def _outputs(batches: dict[int, Any]) -> Iterable[Any]:
    return (output for batch in batches.values() for output in batch.outputs)


def _add(scheduler: Any, request: Any) -> None:
    """Pass a request to the scheduler's original method, without waiting for slots."""
    type(scheduler).add_request.__wrapped__(scheduler, request)
