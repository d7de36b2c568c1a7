"""Requests that take part in an experiment: whose they are, which arm they get, and the body that vLLM gets for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from steer.experiments.assignment import Decision, Identity
from steer.experiments.feedback import response_known_as
from steer.serving.engine.resolved import EXPRESSION, RESOLVED
from steer.serving.http import bodies
from steer.serving.http.answers import Message
from steer.serving.http.fields import ARGUMENTS, is_true, misplaced

if TYPE_CHECKING:
    from steer.experiments.running.live import Live

RECALL = 1.0  # seconds; on a busy machine a look-up was seen to take a quarter of one
ARM_HEADER, CONVERSATION_HEADER = b"x-steer-arm", b"x-steer-conversation"
_ENCODE = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class Refused(Exception):
    """Raised for a request that can't take part as it asks to: the parameter, and what is wrong."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class Exposed(NamedTuple):
    """A request that takes part: the experiment, its decision, the client's prompt, the body for vLLM, and two names.

    `usage` is true where the client asked for token counts at the end of a stream; `trace` is that of traceparent.
    """

    live: Live
    decision: Decision
    prompt: Any  # messages or text, without what an arm adds
    body: dict[str, Any]
    served: str  # the model that vLLM answers as
    called: str  # the model that the client called
    usage: bool
    trace: str | None


def exposed(
    scope: Message, route: str, value: Any, live: Live | None, base: str, adapters: Mapping[str, str]
) -> Exposed | None:
    """The part that a request takes in an experiment; None for a request that is not part of one. Raises Refused.

    `value` is the body, `live` the experiment that its model names, `adapters` the served names of LoRA arms by arm.
    """
    forced = bodies.header_text(scope, ARM_HEADER)
    if live is None or not isinstance(value, dict):
        if forced and isinstance(value, dict):
            raise Refused("X-Steer-Arm", f"X-Steer-Arm forces an arm of an experiment, and {_shown(value)} is none")
        return None
    called, experiment = str(value.get("model") or base), live.experiment
    field = _asks_for_steering(value)
    if field is not None:
        if called != experiment.name:
            return None  # a request for the base model that is steered by itself
        raise Refused(field, f"the experiment {called} decides how its requests are steered; {field!r} is refused")
    if (impossible := _impossible(route, value, live)) is not None:
        if called != experiment.name and not forced:
            return None  # a request for the base model as the client has always made it
        raise Refused(*impossible)
    identity = identify(scope, route, value, live)
    try:
        decision = live.decide(identity, forced.removeprefix(f"{experiment.name}:") or None)
    except KeyError:
        names = ", ".join(arm.name for arm in experiment.arms)
        raise Refused(
            "X-Steer-Arm", f"the experiment {experiment.name} has no arm {forced[:64]!r}; arms: {names}"
        ) from None
    served = adapters.get(decision.arm.name, base)
    body = {**value, "model": served}
    if decision.arm.steer:
        extra = value.get(ARGUMENTS)
        body[ARGUMENTS] = {**(extra if isinstance(extra, dict) else {}), EXPRESSION: decision.arm.steer}
    if decision.arm.system:
        body = with_system(route, body, decision.arm.system)
    options = value.get("stream_options")
    usage = isinstance(options, dict) and bool(options.get("include_usage"))
    if is_true(value.get("stream")) and route in ("/v1/chat/completions", "/v1/completions"):
        body["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    return Exposed(live, decision, prompt_of(value), body, served, called, usage, trace_of(scope))


def _impossible(route: str, value: Mapping[str, Any], live: Live) -> tuple[str, str] | None:
    """Why a request can't get every arm of an experiment, whichever it is assigned: the parameter, and the reason."""
    arms, name = live.experiment.arms, live.experiment.name
    if is_true(value.get("use_beam_search")) and any(arm.steer for arm in arms):
        return "use_beam_search", f"the experiment {name} has a steered arm, and beam search can't be steered"
    if is_true(value.get("background")):
        return "background", "a response in the background can't take part in an experiment"
    if route == "/v1/completions" and any(arm.system for arm in arms):
        return "model", f"the experiment {name} has an arm with a system prompt, which {route} has no place for"
    return None


async def recall(scope: Message, route: str, value: Any, live: Live | None) -> None:
    """Let an adaptive experiment find out which arm the unit of a request has, where only its log may know.

    It waits for the log at most `RECALL` seconds: then the unit counts as a new one.
    """
    if live is None or live.adaptive is None or live.writer.away or not isinstance(value, dict):
        return
    unit = live.adaptive.unknown(identify(scope, route, value, live).unit, live.coverage)
    if unit is not None:
        with contextlib.suppress(Exception):  # whatever it is, the request goes on
            await asyncio.wait_for(asyncio.to_thread(live.adaptive.look_up, unit), RECALL)


def identify(scope: Message, route: str, value: Mapping[str, Any], live: Live) -> Identity:
    """Who sends a request, by the experiment's unit; without an id, the conversation is found by its first message."""
    user = user_of(route, value)
    unit = user if live.experiment.unit == "user" else None
    if live.experiment.unit.startswith("header:"):
        unit = bodies.header_text(scope, live.experiment.unit.removeprefix("header:").encode()) or None
    conversation, source, begins = conversation_of(scope, value, unit or user)
    previous = value.get("previous_response_id")
    previous = response_known_as(previous) if isinstance(previous, str) and previous else ""
    if unit is not None:
        source = live.experiment.unit.partition(":")[0]
    return Identity(conversation if unit is None else unit, source, conversation, begins, previous)


def conversation_of(scope: Message, value: Mapping[str, Any], user: str | None) -> tuple[str, str, bool]:
    """What a conversation is known by, what that is (its id, or its first message), and whether it begins.

    The id of the response that a request continues counts as one.
    """
    known = _conversation(scope, value) or value.get("previous_response_id")
    if isinstance(known, str) and known:
        return known, "conversation", False
    first, begins = _first_message(prompt_of(value))
    return _ENCODE([user, first]), "first message", begins


def user_of(route: str, value: Mapping[str, Any]) -> str | None:
    """The user, as the client names one."""
    user = value.get("user")
    if route == "/v1/messages" and isinstance(value.get("metadata"), dict):
        user = value["metadata"].get("user_id")
    return user if isinstance(user, str) and user else None


def prompt_of(value: Mapping[str, Any]) -> Any:
    """The messages or the text of a request, by the names of the four routes."""
    return value.get("messages", value.get("input", value.get("prompt")))


def _conversation(scope: Message, value: Mapping[str, Any]) -> str | None:
    """The id of a conversation, as the client sends it; None where it sends none."""
    header = bodies.header_text(scope, CONVERSATION_HEADER)
    field = value.get("conversation")
    if isinstance(field, dict):
        field = field.get("id")
    return header or (field if isinstance(field, str) and field else None)


def _first_message(messages: Any) -> tuple[Any, bool]:
    """What the user said first, and whether nothing has been answered yet."""
    if not isinstance(messages, list) or not any(isinstance(message, dict) for message in messages):
        return messages, True
    roles = [(message.get("role"), message) for message in messages if isinstance(message, dict)]
    first = next((message.get("content") for role, message in roles if role == "user"), None)
    return first, not any(role == "assistant" for role, _ in roles)


def with_system(route: str, body: dict[str, Any], system: str) -> dict[str, Any]:
    """The body of a request with a system prompt, which stands before the client's own where there is one."""
    if route in ("/v1/messages", "/v1/responses"):
        field = "system" if route == "/v1/messages" else "instructions"
        return {**body, field: _before(system, body.get(field))}
    messages = body.get("messages")
    if not isinstance(messages, list):
        return body  # which vLLM refuses
    first = messages[0] if messages else None
    if isinstance(first, dict) and first.get("role") in ("system", "developer"):
        return {**body, "messages": [{**first, "content": _before(system, first.get("content"))}, *messages[1:]]}
    return {**body, "messages": [{"role": "system", "content": system}, *messages]}


def _before(system: str, content: Any) -> Any:
    if isinstance(content, list):
        return [{"type": "text", "text": system}, *content]
    return f"{system}\n\n{content}" if isinstance(content, str) and content else system


def _asks_for_steering(value: Mapping[str, Any]) -> str | None:
    """The field with which a request asks for an expression of its own."""
    extra = value.get(ARGUMENTS)
    for name in (EXPRESSION, RESOLVED):
        if isinstance(extra, dict) and name in extra:
            return f"{ARGUMENTS}.{name}"
    return misplaced(value)


def trace_of(scope: Message) -> str | None:
    """The trace id of a valid traceparent header."""
    match = _TRACEPARENT.fullmatch(bodies.header(scope, b"traceparent").decode("latin-1"))
    return match[1] if match else None


def _shown(value: Mapping[str, Any]) -> str:
    return f"the model {str(value.get('model'))[:100]!r}"
