"""The hooks in vLLM's front end: requests are admitted on the way in, receipts are taken off the outputs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from probes.models.markers import Markers, markers_of
from steer.serving.engine import background, bounds, metrics, receipts
from steer.serving.engine.admission import Admission, explain
from steer.serving.engine.residency import Residency
from steer.serving.engine.resolved import EXPRESSION, RESOLVED, resolved_of
from steer.serving.engine.scheduler_hooks import RECEIPT
from steer.serving.settings import Settings, from_environment
from vectors import references
from vectors.errors import ModelError, SteerError, UsageError
from vectors.probe import Probe
from vectors.steering import SteeringVector
from vectors.storage.files import digest_bytes

_ADMISSIONS: weakref.WeakKeyDictionary[Any, Admission] = weakref.WeakKeyDictionary()


def admission_of(processor: Any) -> Admission:
    """The admission of an engine, given its input processor; made at first use. Raises UsageError."""
    admission = _ADMISSIONS.get(processor)
    if admission is None:
        admission = _ADMISSIONS[processor] = check(from_environment(), processor.model_config)
    return admission


def check(settings: Settings, model: Any) -> Admission:
    """The admission for a model, given vLLM's ModelConfig. Raises UsageError when the settings don't fit the model."""
    sizes = model.get_hidden_size(), model.get_total_num_hidden_layers()
    return Admission(settings, *sizes, _base(model), model.dtype, _markers(settings, model))


def _markers(settings: Settings, model: Any) -> Markers | None:
    """The markers of the model's sections; None where no gates could see its tokens. Raises UsageError."""
    if not settings.gates or model.skip_tokenizer_init or model.enable_prompt_embeds:
        return None
    from vllm.tokenizers import cached_tokenizer_from_config

    try:
        return markers_of(cached_tokenizer_from_config(model), settings.markers)
    except ValueError as error:
        raise UsageError(str(error), "--steer-markers thinking='<think>,</think>' gives others") from error


def _base(model: Any) -> dict[str, Any] | None:
    """The identity of the served model, None where its files can't be found."""
    try:
        name, revision = str(model.model), model.revision
        reference = name if not revision or Path(name).is_dir() else f"{name}@{revision}"
        return references.identity(references.resolve(reference))
    except ModelError:
        return None


def process_inputs(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Admit a request after vLLM's own checks. Raises VLLMValidationError, which HTTP answers with 400."""
    request = original(self, *args, **kwargs)
    try:
        admission_of(self).admit(request)
    except ValueError as error:
        raise _invalid(str(error)) from error
    return request


def _invalid(message: str) -> Exception:
    """The error with which vLLM refuses a request that can't be steered."""
    from vllm.exceptions import VLLMValidationError

    if (http := receipts.current()) is not None:
        http.refused = True
    return VLLMValidationError(message, parameter=EXPRESSION)


def start(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    """Offline use: send the vectors to the workers as soon as the engine exists."""
    original(self, *args, **kwargs)
    for vector, _ in admission_of(self.input_processor).bound.values():
        self.collective_rpc("steer_load", args=(vector.encode(),))


async def enter(
    original: Callable[..., Any], self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    """Resolve a request that enters the engine, unless HTTP has, and hold its vectors until it has entered."""
    extra = getattr(params, "extra_args", None) or {}
    if EXPRESSION not in extra or RESOLVED in extra:  # RESOLVED sent by a client is refused at admission
        return await original(self, request_id, prompt, params, *args, **kwargs)
    admission = admission_of(self.input_processor)
    self.output_processor.steer_residency = admission.residency
    http = receipts.current()
    if http is None and getattr(self, "steer_serves_http", False):
        raise _invalid("this route can't be steered: its answer would carry no receipt")
    try:
        if http is not None and http.expression != extra[EXPRESSION]:
            raise RuntimeError(f"steer: {extra[EXPRESSION]!r} is not the expression of the HTTP request")
        resolved = http.resolved if http is not None else admission.resolve(extra[EXPRESSION])
        held = list(resolved.vectors.values())
        try:
            admission.residency.hold(held)
        except LookupError as error:
            raise _invalid(
                f"a vector of this request was unloaded before the request entered the engine: {error}"
            ) from error
        try:
            # A copy: the caller may reuse the same parameters later, when the names are bound to other vectors.
            params = params.clone()
            params.extra_args = {**extra, RESOLVED: resolved}
            return await original(self, request_id, prompt, params, *args, **kwargs)
        finally:
            admission.residency.release(held)
    except SteerError as error:
        raise _invalid(explain(error)) from error


async def bind(engine: Any, name: str, vector: SteeringVector | Probe) -> str:
    """Send a vector or a probe to the workers and bind it to a name; return its digest. Raises SteerError."""
    admission = admission_of(engine.input_processor)
    content, digest = await background.run(_prepared, vector)
    admission.require_bindable(name, vector, digest)  # before it is sent; `bind` checks again under the lock
    async with admission.residency.delivered(digest, content):
        if admission.bind(name, vector, digest):
            admission.residency.hold([digest])
    return digest


def _prepared(vector: SteeringVector | Probe) -> tuple[bytes, str]:
    """The artifact file of a vector or probe and its digest; what admission needs of the vector is computed too."""
    content = vector.encode()
    if isinstance(vector, SteeringVector):
        bounds.measure(vector)
    return content, digest_bytes(content)


def unbind(engine: Any, name: str) -> str:
    """Unbind a name; return the digest. The vector is unloaded once no request holds it. Raises UsageError."""
    admission = admission_of(engine.input_processor)
    digest = admission.unbind(name)
    admission.residency.release([digest])
    return digest


async def begin_serving(engine: Any, *, shared: bool = False) -> None:
    """Start serving HTTP: send the workers the vectors of the settings. `shared`: other front ends do the same."""
    admission = admission_of(engine.input_processor)
    engine.steer_serves_http = True
    admission.residency.connect(engine.collective_rpc, shared=shared)
    for vector, digest in list(admission.bound.values()):
        async with admission.residency.delivered(digest, vector.encode()):
            admission.residency.hold([digest])


def follow(original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """Follow a request until it ends: hold its vectors, and tell its HTTP request to expect a receipt."""
    resolved = resolved_of(request)
    if resolved is None:
        original(self, request, *args, **kwargs)
        return
    http = receipts.current()
    if http is not None and http.resolved.key != resolved.key:
        raise RuntimeError(f"steer: request {request.request_id} has another composition than its HTTP request")
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
    """Take the receipts off the engine's outputs, so that vLLM sees its outputs unchanged."""
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
    """Add the receipt to a finished completion as `.steer`; None when it was not steered."""
    completion = original(self, token_ids, finish_reason, *args, **kwargs)
    if finish_reason is not None:
        completion.steer = getattr(self, "steer_receipt", None)
        http = getattr(self, "steer_request", None)
        if http is not None and completion.steer is not None:
            http.add(self.request_id, completion.steer)
    return completion


def finish(original: Callable[..., Any], self: Any, state: Any) -> None:
    """Release what a finished request held."""
    original(self, state)
    _end(state)


def abort(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Release what aborted requests held."""
    before = {key: state for key, state in self.request_states.items() if hasattr(state, "steer_held")}
    result = original(self, *args, **kwargs)
    for key, state in before.items():
        if key not in self.request_states:
            _end(state)
    return result


def _end(state: Any) -> None:
    """Release the vectors of a request state (vLLM's) that is removed, and count the request in the metrics."""
    held = state.__dict__.pop("steer_held", None)
    if held is not None:
        residency, digests = held
        if residency is not None:
            residency.release(digests)
        metrics.ended(state.steer_request, getattr(state, "steer_receipt", None))
