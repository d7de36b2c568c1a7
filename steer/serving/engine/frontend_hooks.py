"""The joins in the front end: requests are admitted on their way in, receipts taken off on their way out."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steer.serving.engine import metrics, receipts
from steer.serving.engine.admission import Admission, explain
from steer.serving.engine.residency import Residency
from steer.serving.engine.resolved import EXPRESSION, RESOLVED, resolved_of
from steer.serving.engine.scheduler_hooks import RECEIPT
from steer.serving.settings import Settings, from_environment
from vectors import references
from vectors.errors import ModelError, SteerError
from vectors.files import digest_bytes
from vectors.steering import SteeringVector

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


async def enter(
    original: Callable[..., Any], self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    """A request on its way into the engine: resolved if HTTP has not done it, and its vectors held till it is there."""
    extra = getattr(params, "extra_args", None) or {}
    if EXPRESSION not in extra or RESOLVED in extra:  # a client's own RESOLVED is refused at admission
        return await original(self, request_id, prompt, params, *args, **kwargs)
    admission = admission_of(self.input_processor)
    self.output_processor.steer_residency = admission.residency
    http = receipts.current()
    if http is None and getattr(self, "steer_serves_http", False):
        raise _at_fault("this route can't be steered: no receipt would come with its answer")
    try:
        if http is not None and http.expression != extra[EXPRESSION]:
            raise RuntimeError(f"steer: {extra[EXPRESSION]!r} is not what the HTTP request asked for")
        resolved = http.resolved if http is not None else admission.resolve(extra[EXPRESSION])
        held = list(resolved.vectors.values())
        try:
            admission.residency.hold(held)
        except LookupError as error:
            raise _at_fault(f"a vector of this request was unloaded before the engine took it in: {error}") from error
        try:
            # A copy, since the caller may use the same parameters again, when names mean something else.
            params = params.clone()
            params.extra_args = {**extra, RESOLVED: resolved}
            return await original(self, request_id, prompt, params, *args, **kwargs)
        finally:
            admission.residency.release(held)
    except SteerError as error:
        raise _at_fault(explain(error)) from error


async def bind(engine: Any, name: str, vector: SteeringVector) -> str:
    """Send a vector to the workers and give it a name; return its digest. Raises SteerError."""
    admission = admission_of(engine.input_processor)
    content = await asyncio.to_thread(vector.encode)
    digest = digest_bytes(content)
    admission.require_bindable(name, vector, digest)  # before it is sent; once more when the name is given
    async with admission.residency.delivered(digest, content):
        if admission.bind(name, vector, digest):
            admission.residency.hold([digest])
    return digest


def unbind(engine: Any, name: str) -> str:
    """Take a name away; return the digest. The workers forget the vector when nobody needs it. Raises UsageError."""
    admission = admission_of(engine.input_processor)
    digest = admission.unbind(name)
    admission.residency.release([digest])
    return digest


async def begin_serving(engine: Any) -> None:
    """An engine behind HTTP begins: send the workers the vectors that have names from the start."""
    admission = admission_of(engine.input_processor)
    engine.steer_serves_http = True
    admission.residency.connect(engine.collective_rpc)
    for name, vector in list(admission.vectors.items()):
        async with admission.residency.delivered(admission.digests[name], vector.encode()):
            admission.residency.hold([admission.digests[name]])


def follow(original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """A request is under way: who waits for its receipt, and which vectors it needs until it ends."""
    resolved = resolved_of(request)
    if resolved is None:
        original(self, request, *args, **kwargs)
        return
    http = receipts.current()
    if http is not None and http.resolved.key != resolved.key:
        raise RuntimeError(f"steer: request {request.request_id} would not get what its HTTP request was promised")
    residency: Residency | None = getattr(self, "steer_residency", None)
    digests = list(resolved.vectors.values())
    if residency is not None:
        residency.hold(digests)
    try:
        original(self, request, *args, **kwargs)
        state = self.request_states.get(request.request_id)
    except BaseException:
        if residency is not None:
            residency.release(digests)
        raise
    if state is None:
        if residency is not None:
            residency.release(digests)
        return
    state.steer_held = residency, digests
    state.steer_request = http
    if http is not None:
        http.expect(request.request_id)
    metrics.began(http)


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
        http = getattr(self, "steer_request", None)
        if http is not None and completion.steer is not None:
            http.add(self.request_id, completion.steer)
    return completion


def finish(original: Callable[..., Any], self: Any, state: Any) -> None:
    """A request is done."""
    original(self, state)
    _end(state)


def abort(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Requests are aborted."""
    before = {key: state for key, state in self.request_states.items() if hasattr(state, "steer_held")}
    result = original(self, *args, **kwargs)
    for key, state in before.items():
        if key not in self.request_states:
            _end(state)
    return result


def _end(state: Any) -> None:
    """A request state of vLLM's is gone, done or aborted."""
    held = state.__dict__.pop("steer_held", None)
    if held is not None:
        residency, digests = held
        if residency is not None:
            residency.release(digests)
        metrics.ended(state.steer_request, getattr(state, "steer_receipt", None))
