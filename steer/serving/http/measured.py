"""The answer to a request that takes part in an experiment: what is measured of it, and recorded before it is whole."""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from steer.experiments.feedback import response_known_as
from steer.experiments.outcomes import FAILED, FIRST_ERROR, GONE
from steer.experiments.running.measures import refuses, repetition
from steer.serving.engine.receipts import HttpRequest
from steer.serving.http import bodies, exposure_metrics
from steer.serving.http.answers import Message, Send, compact_json, content_length, without_header
from steer.serving.http.experiments import Exposed
from vectors.storage.files import canonical_json

# Events after which a client has everything: it may close the connection before the empty part that follows.
_ENDS = ("message_stop", "response.completed", "response.incomplete", "response.failed")
# Fields of what a stream has written so far; `reasoning_content` is that of releases of vLLM before `reasoning`.
_WRITTEN = ("content", "text", "reasoning", "reasoning_content", "thinking", "partial_json")
_BEGINS = ("content_block_start", "response.output_item.added")
LONGEST_TEXT = 1_000_000  # characters of an answer that are measured, and stored where texts are
_CLIENT_ERRORS = ("BadRequestError", "invalid_request_error")  # of an event that has no code
_OURS = re.compile(rb"\s*steer\.(experiment|arm)\s*=")  # members of baggage that the server alone says
_BAGGAGE = 4096  # bytes of the client's baggage that are sent back


class MeasuredAnswer:
    """An ASGI send that measures an answer and records it, once, before its last part is sent.

    `finish` records an answer that has not come to its end. `request` is set where the answer is steered.
    """

    def __init__(self, send: Send, exposed: Exposed, scope: Message) -> None:
        self.send, self.exposed, self.scope = send, exposed, scope
        self.request: HttpRequest | None = None
        self.began, self.at = time.monotonic(), time.time()
        self.status = 0
        self.kind = "other"
        self.start: Message = {}
        self.parts: list[bytes] = []
        self.held = b""
        self.ended = False  # whether the last event of the stream has come
        self.first: float | None = None  # when the first token arrived, be it of thinking
        self.last = 0.0
        self.id: str | None = None
        self.texts: dict[int, list[str]] = {}  # of each answer, by its index: those of a stream come interleaved
        self.usage: Mapping[str, Any] = {}
        self.stops: list[str] = []
        self.error: Mapping[str, Any] = {}  # that vLLM has answered, also in the middle of a stream
        self.recorded = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begin(message)
            if self.kind != "json":
                await self.send(self.start)
            return
        if message["type"] != "http.response.body":
            await self.send(message)
            return
        more = bool(message.get("more_body"))
        body = message.get("body", b"")
        if self.kind == "json":
            self.parts.append(body)
            if more:
                return
            body = self._whole(b"".join(self.parts))
            self.record()
            await self.send({**self.start, "headers": [*self.start["headers"], content_length(body)]})
            await self.send({"type": "http.response.body", "body": body})
            return
        if self.kind == "stream":
            message = {**message, "body": self._events(body, more)}
        if self.ended or not more:
            self.record()
        await self.send(message)

    def finish(self) -> None:
        """Record an answer whose end was never sent: the client has gone, or the server failed."""
        if self.recorded:
            return
        failed = isinstance(sys.exc_info()[1], Exception)  # a request that the client gave up is cancelled
        self.status = FAILED if failed else self.status if self.status >= 400 else GONE
        self.record()

    def _begin(self, message: Message) -> None:
        self.status = message["status"]
        headers = [*without_header(message.get("headers", []), b"x-steer-arm"), *self._headers()]
        kind = b"".join(value for name, value in headers if name.lower() == b"content-type")
        if kind.startswith(b"application/json"):
            self.kind = "json"
            headers = without_header(headers, b"content-length")
        elif kind.startswith(b"text/event-stream"):
            self.kind = "stream"
        self.start = {**message, "headers": headers}

    def _headers(self) -> list[tuple[bytes, bytes]]:
        """What the answer says of the experiment, and the trace that the client sent."""
        decision, name = self.exposed.decision, self.exposed.live.experiment.name
        headers = [
            (b"x-steer-experiment", f"{name}; version={decision.version}".encode()),
            (b"x-steer-arm", f"{name}:{decision.arm.name}".encode()),
            (b"x-steer-unit", f"{decision.source}; {decision.reason}".encode()),
        ]
        baggage = bodies.header(self.scope, b"baggage")
        if self.exposed.trace is not None or baggage:
            ours = f"steer.experiment={name},steer.arm={decision.arm.name}".encode()
            theirs = [member for member in baggage[:_BAGGAGE].split(b",") if not _OURS.match(member)]
            headers.append((b"baggage", b",".join(part for part in (*theirs, ours) if part)))
        if self.exposed.trace is not None:
            headers.append((b"traceparent", bodies.header(self.scope, b"traceparent")))
        return headers

    def _whole(self, body: bytes) -> bytes:
        """The JSON body, read, with the model that the client called."""
        try:
            value = json.loads(body)
        except ValueError:
            return body
        if not isinstance(value, dict):
            return body
        self._read(value)
        if value.get("model") == self.exposed.served and self.status == 200:
            return renamed(body, value, self.exposed.served, self.exposed.called)
        return body

    def _events(self, body: bytes, more: bool) -> bytes:
        """The complete events of a stream so far, read; an incomplete one waits for the next message."""
        self.held += body
        whole, end, self.held = self.held.rpartition(b"\n\n") if more else (self.held, b"", b"")
        events = (whole + end).split(b"\n\n")
        return b"\n\n".join(event for event in map(self._event, events) if event is not None)

    def _event(self, event: bytes) -> bytes | None:
        """An event with the model that the client called; None for one that only we asked for."""
        _, found, data = event.partition(b"data: ")
        if data == b"[DONE]":
            self.ended = True
        if not found or not data.startswith(b"{"):
            return event
        try:
            value = json.loads(data)
        except ValueError:
            return event
        self._read(value)
        if brings_tokens(value):
            self.last = time.monotonic()
            self.first = self.first or self.last
        if value.get("type") in _ENDS:
            self.ended = True
        if not self.exposed.usage and value.get("choices") == [] and value.get("usage") and "steer" not in value:
            return None
        return event.replace(_field(self.exposed.served), _field(self.exposed.called))

    def _read(self, value: Mapping[str, Any]) -> None:
        """Take id, text, reasons to stop and token counts from a body or an event, of any of the four routes."""
        inner = value.get("response") or value.get("message")  # of Responses and of Messages
        inner = inner if isinstance(inner, dict) else value
        if isinstance(inner.get("id"), str):
            self.id = self.id or inner["id"]
        if isinstance(error := inner.get("error"), dict):
            self.error = error
        if isinstance(inner.get("usage"), dict):
            self.usage = {**self.usage, **{k: v for k, v in inner["usage"].items() if v is not None}}
        for number, choice in enumerate(value.get("choices") or ()):
            part = choice.get("message") or choice.get("delta") or choice
            index, text = choice.get("index"), part.get("content") if part is not choice else choice.get("text")
            self._text(text, index if isinstance(index, int) else number)
            self._stop(choice.get("finish_reason"))
        delta = value.get("delta")
        if isinstance(delta, dict):  # Messages
            self._text(delta.get("text"))
            self._stop(delta.get("stop_reason"))
        elif value.get("type") == "response.output_text.delta":
            self._text(delta)
        elif value.get("type") in ("response.completed", "response.incomplete"):
            self._stop(inner.get("status"))
        if "type" not in value or value.get("type") == "message":  # a whole body of Messages or Responses
            self._stop(value.get("stop_reason") or (value.get("status") if "output" in value else None))
            for item in (value.get("content") or value.get("output") or ()) if "choices" not in value else ():
                for part in item.get("content") or (item,) if isinstance(item, dict) else ():
                    self._text(part.get("text") if isinstance(part, dict) else None)

    def _text(self, text: Any, answer: int = 0) -> None:
        if isinstance(text, str):
            self.texts.setdefault(answer, []).append(text)

    def _stop(self, reason: Any) -> None:
        if isinstance(reason, str) and reason:
            self.stops.append(reason)

    @functools.cached_property
    def answers(self) -> list[str]:
        """The text of each answer that the request asked for, once they are recorded."""
        return ["".join(self.texts[answer])[:LONGEST_TEXT] for answer in sorted(self.texts)] or [""]

    @property
    def text(self) -> str:
        """The text of all answers, a paragraph each."""
        return "\n\n".join(self.answers)

    def record(self) -> None:
        """Record the answer, once."""
        if self.recorded:
            return
        self.recorded = True
        prompt = self.exposed.prompt
        if isinstance(prompt, str) and self.scope["path"].endswith("/responses"):  # what a user says, and no raw text
            prompt = [{"role": "user", "content": prompt}]
        prompt = json.dumps(prompt, ensure_ascii=False) if self.exposed.live.experiment.judges else ""
        self.exposed.live.record(self.exposed.decision, self.measured(), (prompt, self.text))
        exposure_metrics.recorded(self.exposed)
        annotate(self.exposed, self.scope, self.at)

    def outcome(self) -> int:
        """The status for the log, which may say more than that of HTTP: a stream has sent 200 before it breaks off.

        A client can't ask for steering in an experiment, so where steering is refused the server has failed its arm.
        """
        if not self.error:
            return self.status
        if self.request is not None and self.request.refused:
            return FAILED
        if self.status >= FIRST_ERROR:
            return self.status
        code, kind = self.error.get("code"), self.error.get("type")
        if isinstance(code, int) and FIRST_ERROR <= code < 600:
            return code
        return FIRST_ERROR if kind in _CLIENT_ERRORS else FAILED

    def measured(self) -> dict[str, Any]:
        """What is measured of the answer, as columns of the exposures."""
        now, usage, answers = time.monotonic(), self.usage, self.answers
        receipt = (self.request.total() if self.request is not None else None) or {}
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        # Counted as in the answers of arms that are not steered. A receipt counts the tokens that the model has read,
        # which the last one is not; it decides only where the client was told nothing.
        tokens = usage.get("completion_tokens", usage.get("output_tokens", receipt.get("response_tokens")))
        streamed = self.kind == "stream" and self.first is not None
        between = (self.last - self.first) / (tokens - 1) if streamed and self.first and tokens and tokens > 1 else None
        texts = self.exposed.live.experiment.store_texts
        return {
            "at": self.at,
            "response": response_known_as(self.id) if self.id else None,
            "composition": receipt.get("digest"),
            "status": self.outcome(),
            "answers": receipt.get("answers", max(len(self.stops), 1)),
            "prompt_tokens": usage.get("prompt_tokens", usage.get("input_tokens", receipt.get("prompt_tokens"))),
            "cached_tokens": receipt.get("cached_tokens", details.get("cached_tokens")),
            "response_tokens": tokens,
            "ttft": self.first - self.began if streamed and self.first is not None else None,
            "inter_token": between,
            "latency": now - self.began,
            "stop": ",".join(sorted(set(self.stops)))[:100] or None,
            "weight_version": receipt.get("weight_version", self.exposed.live.weight_version),
            "gates": canonical_json(receipt["gates"]) if receipt.get("gates") else None,
            "characters": sum(map(len, answers)),
            "repetition": sum(map(repetition, answers)) / len(answers),
            "refusal": any(map(refuses, answers)),
            "trace": self.exposed.trace,
            "prompt": json.dumps(self.exposed.prompt) if texts else None,
            "answer": self.text if texts else None,
        }


def brings_tokens(event: Mapping[str, Any]) -> bool:
    """Whether an event of a stream, of any of the four routes, brings tokens: of the text, of thinking, or of a call of
    a tool, which the number of tokens counts alike."""
    for choice in event.get("choices") or ():
        part = choice.get("delta") or choice
        if part.get("tool_calls") or any(isinstance(part.get(name), str) for name in _WRITTEN):
            return True
    kind, delta = str(event.get("type")), event.get("delta")
    if isinstance(delta, dict):  # Messages
        return any(isinstance(delta.get(name), str) for name in _WRITTEN)
    if kind.endswith(".delta"):  # Responses
        return isinstance(delta, str)
    begun = event.get("content_block") or event.get("item")  # the name of a tool comes without a delta
    return kind in _BEGINS and isinstance(begun, dict) and str(begun.get("type")).endswith(("tool_use", "_call"))


def renamed(body: bytes, value: dict[str, Any], served: str, called: str) -> bytes:
    """The JSON body of an answer, parsed in `value`, with another name of the model."""
    # Quotes inside JSON strings are escaped, so that this pattern matches fields alone; the only one is the answer's.
    if body.count(b'"model":') == body.count(_field(served)) == 1:
        return body.replace(_field(served), _field(called))
    return compact_json({**value, "model": called})


@functools.lru_cache(1024)
def _field(model: str) -> bytes:
    """The field with the name of the model, as vLLM writes it."""
    return b'"model":' + json.dumps(model).encode()


def annotate(exposed: Exposed, scope: Message, began: float) -> None:
    """Set attributes of the experiment on the current span of OpenTelemetry, or on one of our own; none where it is
    off."""
    if "opentelemetry.sdk.trace" not in sys.modules:
        return
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):  # vLLM imports the SDK where it is off too
        return
    attributes = {
        "steer.experiment": exposed.live.experiment.name,
        "steer.arm": exposed.decision.arm.name,
        "steer.digest": exposed.decision.arm.digest,
    }
    span = trace.get_current_span()
    if span.is_recording():
        span.set_attributes(attributes)
        return
    carrier = {"traceparent": bodies.header(scope, b"traceparent").decode("latin-1")}
    context = TraceContextTextMapPropagator().extract(carrier)
    tracer = trace.get_tracer("steer")
    tracer.start_span("steer.exposure", context, attributes=attributes, start_time=int(began * 1e9)).end()
