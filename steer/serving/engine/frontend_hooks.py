"""The joins in the front end: requests are admitted on their way in, receipts taken off on their way out."""

from __future__ import annotations

import asyncio
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steer.serving.engine import metrics, receipts
from steer.serving.engine.admission import Admission
from steer.serving.engine.resolved import EXPRESSION, resolved_of
from steer.serving.engine.scheduler_hooks import RECEIPT
from steer.serving.settings import Settings, from_environment
from vectors import references
from vectors.errors import ModelError
from vectors.steering import SteeringVector

_RUNNING: Counter[str] = Counter()  # requests under way in this process, by the digests of their vectors
_ENTERING: set[object] = set()  # requests between admission and that
_ADMISSIONS: weakref.WeakKeyDictionary[Any, Admission] = weakref.WeakKeyDictionary()


def admission_of(processor: Any) -> Admission:
    """The admission of an engine, by its input processor; made at first use. Raises UsageError."""
    found = _ADMISSIONS.get(processor)
    if found is None:
        found = _ADMISSIONS[processor] = check(from_environment(), processor.model_config)
    return found


def check(settings: Settings, model: Any) -> Admission:
    """The admission of a model (vLLM's configuration of it). Raises UsageError when the settings don't fit it."""
    return Admission(settings, model.get_hidden_size(), model.get_total_num_hidden_layers(), _base(model))


def _base(model: Any) -> dict[str, Any] | None:
    """The identity of the served model, None where its files are not at hand."""
    try:
        name, revision = str(model.model), model.revision
        reference = name if not revision or Path(name).is_dir() else f"{name}@{revision}"
        return references.identity(references.resolve(reference))
    except ModelError:
        return None


def process_inputs(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM's own checks, then ours. Raises vLLM's error for a request at fault: HTTP answers 400."""
    request = original(self, *args, **kwargs)
    try:
        admission_of(self).admit(request)
    except ValueError as error:
        raise _at_fault(str(error)) from error
    return request


def _at_fault(message: str) -> Exception:
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(message, parameter=EXPRESSION)


def start(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    """Offline: the workers get the vectors as soon as there is an engine."""
    original(self, *args, **kwargs)
    for vector in admission_of(self.input_processor).vectors.values():
        self.collective_rpc("steer_load", args=(vector.encode(),))


async def enter(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """A request is on its way from admission to the engine: nothing that it may have been admitted with is unloaded."""
    token = object()
    _ENTERING.add(token)
    try:
        return await original(self, *args, **kwargs)
    finally:
        _ENTERING.discard(token)


async def deliver(engine: Any, vector: SteeringVector) -> None:
    """Send a vector to the workers that lack it, before a name makes it known to requests."""
    there: dict[str, asyncio.Task[Any]] = engine.__dict__.setdefault("steer_delivered", {})
    digest = vector.digest
    if digest not in there:
        # A task of its own: a client that hangs up does not end what others wait for.
        there[digest] = asyncio.ensure_future(engine.collective_rpc("steer_load", args=(vector.encode(),)))
    try:
        await asyncio.shield(there[digest])
    except Exception:
        there.pop(digest, None)
        raise


async def discard(engine: Any, digest: str, *, every: float = 0.5) -> None:
    """Let the workers forget a vector as soon as no name and no running request needs it."""
    admission = admission_of(engine.input_processor)
    entering = set(_ENTERING)  # those who may have been admitted while the vector had its name
    while _RUNNING[digest] or entering & _ENTERING:
        await asyncio.sleep(every)
    if not admission.named(digest) and digest in engine.__dict__.get("steer_delivered", {}):
        del engine.steer_delivered[digest]
        await engine.collective_rpc("steer_unload", args=(digest,))


def follow(original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """A request is under way: who waits for its receipt."""
    original(self, request, *args, **kwargs)
    state = self.request_states.get(request.request_id)
    resolved = resolved_of(request)
    if state is not None and resolved is not None:
        state.steer_resolved = resolved
        state.steer_sheet = receipts.current()
        if state.steer_sheet is not None:
            state.steer_sheet.expect(request.request_id)
        metrics.began(state.steer_sheet)
        _RUNNING.update(resolved.vectors.values())


def process_outputs(original: Callable[..., Any], self: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Take the receipts off the engine's outputs, so that vLLM sees what it always sees."""
    for output in outputs:
        carried = output.kv_transfer_params
        if carried and RECEIPT in carried:
            receipt = carried.pop(RECEIPT)
            output.kv_transfer_params = carried or None
            metrics.capacity(receipt.pop("capacity"))
            state = self.request_states.get(output.request_id)
            if state is not None:
                state.steer_receipt = receipt
    return original(self, outputs, *args, **kwargs)


def new_completion_output(
    original: Callable[..., Any], self: Any, token_ids: Any, finish_reason: Any, *args: Any, **kwargs: Any
) -> Any:
    """A finished completion carries its receipt as `.steer`, None when it was not steered."""
    completion = original(self, token_ids, finish_reason, *args, **kwargs)
    if finish_reason is not None:
        completion.steer = getattr(self, "steer_receipt", None)
        sheet = getattr(self, "steer_sheet", None)
        if sheet is not None and completion.steer is not None:
            sheet.add(self.request_id, completion.steer)
    return completion


def finish(original: Callable[..., Any], self: Any, state: Any) -> None:
    """A request is done."""
    original(self, state)
    _end(state)


def abort(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Requests are aborted."""
    before = {key: state for key, state in self.request_states.items() if hasattr(state, "steer_resolved")}
    result = original(self, *args, **kwargs)
    for key, state in before.items():
        if key not in self.request_states:
            _end(state)
    return result


def _end(state: Any) -> None:
    """A request state of vLLM's is gone, done or aborted."""
    resolved = state.__dict__.pop("steer_resolved", None)
    if resolved is not None:
        _RUNNING.subtract(resolved.vectors.values())
        metrics.ended(state.steer_sheet, getattr(state, "steer_receipt", None))
