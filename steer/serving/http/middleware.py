"""The HTTP middleware: resolves arms and expressions, refuses what can't be steered, and adds receipts to answers.

A request without steering is passed on unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

from steer.serving.engine import receipts
from steer.serving.engine.admission import Admission, explain
from steer.serving.engine.receipts import HttpRequest
from steer.serving.engine.resolved import EXPRESSION, RESOLVED
from steer.serving.http.answers import Message, Send, SteeredAnswer, content_length, send_json, without_header
from vectors.errors import SteerError

Receive = Callable[[], Awaitable[Message]]

STEERED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
# Routes that generate no text. A request to one of them, or to a path below it, is passed on unread.
NOT_GENERATING = (
    *("/steer", "/tokenize", "/detokenize", "/v1/messages/count_tokens", "/ping", "/health", "/metrics"),
    *("/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank"),
    *("/v2/rerank", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/abort_requests"),
    *("/inference/v1/abort_requests", "/v1/chat/completions/render", "/v1/completions/render"),
    *("/v1/chat/completions/derender", "/v1/completions/derender", "/start_profile", "/stop_profile"),
    *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/collective_rpc", "/sleep", "/wake_up"),
    *("/release_kv_cache_memory", "/scale_elastic_ep", "/is_scaling_elastic_ep", "/pause", "/resume"),
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update"),
    *("/start_draft_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version"),
    *("/weight_checker", "/fault_tolerance"),
)
_CANCEL = re.compile(r"/v1/responses/[^/]+/cancel")


class _Refusal(Exception):
    """Raised for a request that is refused: the HTTP status and the body of the answer."""

    def __init__(self, status: int, kind: str, parameter: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": parameter, "code": status}}


class Middleware:
    """ASGI middleware. `find` returns the admission and a test for names of served models, None before the start."""

    def __init__(self, app: Any, find: Callable[[], tuple[Admission, Callable[[str], bool]] | None]) -> None:
        self.app, self.find = app, find

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        serving = self.find() if scope["type"] == "http" and scope["method"] == "POST" and may_generate(path) else None
        if serving is None:
            await self.app(scope, receive, send)
            return
        body = await _body(receive)
        if body is None:
            return  # the client has disconnected before the end of its request
        admission, served = serving
        try:
            request = _request(path, body, admission, served)
        except _Refusal as refusal:
            await send_json(send, refusal.status, refusal.body)
            return
        if request is None:
            await self.app(scope, _replay(body, receive), send)
            return
        content, http, names = request
        scope = {**scope, "headers": [*without_header(scope["headers"], b"content-length"), content_length(content)]}
        receipts.use(http)
        # From here on the request keeps its vectors, whatever names are bound or unbound meanwhile.
        try:
            with admission.residency.holding(http.resolved.vectors.values()):
                await self.app(scope, _replay(content, receive), SteeredAnswer(send, http, names))
        finally:
            receipts.use(None)


def may_generate(path: str) -> bool:
    """Whether a POST to this path may generate text; True for an unknown route."""
    if path in STEERED:
        return True
    known = any(path == route or path.startswith(f"{route}/") for route in NOT_GENERATING)
    return not known and not _CANCEL.fullmatch(path)


def _request(
    path: str, body: bytes, admission: Admission, served: Callable[[str], bool]
) -> tuple[bytes, HttpRequest, tuple[str, str] | None] | None:
    """A steered request as (body for vLLM, HttpRequest, names); `names` is (served model, requested model) for an arm.

    None for a request that is not steered, or that vLLM will refuse itself. Raises _Refusal.
    """
    value = _parsed(body)
    if not isinstance(value, dict):
        return None
    extra, model, arm, names = value.get("vllm_xargs"), value.get("model"), None, None
    if isinstance(extra, str) and path not in STEERED:  # routes with form data send it as text
        parsed = _parsed(extra)
        extra = parsed if isinstance(parsed, dict) else extra
    expression = extra.get(EXPRESSION) if isinstance(extra, dict) else None
    steered = isinstance(extra, dict) and EXPRESSION in extra
    if isinstance(extra, dict) and RESOLVED in extra:
        raise _bad("vllm_xargs", f"{RESOLVED} can't be set by a client; use {EXPRESSION}")
    if isinstance(model, str) and ":" in model and not served(model) and served(model.rpartition(":")[0]):
        base, _, arm = model.rpartition(":")
        if arm not in admission.settings.arms:
            known = ", ".join(f"{base}:{name}" for name in admission.settings.arms) or "none"
            raise _Refusal(404, "NotFoundError", "model", f"there is no arm {arm!r} of {base}; arms: {known}")
        if extra is not None and not isinstance(extra, dict):
            raise _bad("vllm_xargs", f"vllm_xargs is {json.dumps(extra)[:60]}, not an object")
        if expression is not None:
            raise _bad("vllm_xargs", f"the request names the arm {arm!r} and steer {expression!r}: give one")
        expression, steered, names = str(admission.settings.arms[arm]), True, (base, model)
        value = {**value, "model": base, "vllm_xargs": {**(extra or {}), EXPRESSION: expression}}
        body = json.dumps(value).encode()
    if not steered:
        return None
    unsupported = path if path not in STEERED else "beam search" if value.get("use_beam_search") else None
    if unsupported is not None:
        raise _bad("vllm_xargs.steer", f"{unsupported} can't be steered: vLLM passes it no expression")
    try:
        resolved = admission.resolve(expression)
    except SteerError as error:
        raise _bad("vllm_xargs.steer", explain(error)) from error
    return body, HttpRequest(arm, str(expression), resolved), names


def _bad(parameter: str, message: str) -> _Refusal:
    return _Refusal(400, "BadRequestError", parameter, message)


def _parsed(text: str | bytes) -> Any:
    """A JSON value; None for a text that is not JSON, which vLLM refuses itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


async def _body(receive: Receive) -> bytes | None:
    """The whole body of a request; None when the client disconnects before its end."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """An ASGI receive that returns the body once more, and then later messages, such as a disconnect."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
