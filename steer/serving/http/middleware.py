"""The HTTP middleware: resolves arms and expressions, refuses what can't be steered, and adds receipts to answers.

A request without steering is passed on unchanged. `routes` says what each route does with steering.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl

from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.routing import BaseRoute

from steer.serving.engine import metrics, receipts
from steer.serving.engine.admission import explain
from steer.serving.engine.receipts import HttpRequest
from steer.serving.engine.resolved import EXPRESSION, RESOLVED
from steer.serving.http import bodies
from steer.serving.http.answers import Message, Send, SteeredAnswer, send_json
from steer.serving.http.bodies import Receive, TooLarge
from steer.serving.http.experiments import ARM_HEADER, Exposed, Refused, conversation_of, exposed, recall, user_of
from steer.serving.http.fields import ADAPTER_HEADER, ARGUMENTS, FORM, Serving, is_true, misplaced, parsed, steering_in
from steer.serving.http.followed import Followed, Version
from steer.serving.http.measured import MeasuredAnswer
from steer.serving.http.routes import WEIGHTS, Kind, bounds_its_bodies, kind_of, route_of
from vectors.errors import SteerError

LISTED = 10  # most arms that an error lists
POLICY_VIOLATION, MESSAGE_TOO_BIG = 1008, 1009  # statuses with which a WebSocket is closed

_Steered = tuple[bytes, HttpRequest, tuple[str, str] | None]  # see `_request`


class _Refusal(Exception):
    """Raised for a request that is refused: the HTTP status and the body of the answer."""

    def __init__(self, status: int, kind: str, parameter: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": parameter, "code": status}}


class Middleware:
    """ASGI middleware in front of an application with these routes. `find` returns None before the start."""

    def __init__(self, app: Any, find: Callable[[], Serving | None], routes: Callable[[], Iterable[BaseRoute]]) -> None:
        self.app, self.find, self.routes = app, find, routes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        route = route_of(self.routes(), scope)
        kind = kind_of(route)
        serving = self.find()
        if serving is None or route is None or bounds_its_bodies(route):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            if kind is not Kind.OTHER:
                await self._websocket(scope, receive, send, serving)
            else:
                await self.app(scope, receive, send)
            return
        measured: MeasuredAnswer | None = None
        part: Exposed | None = None
        try:
            bodies.require_announced(scope, serving.limits.size)
            if kind is Kind.OTHER and not bodies.header(scope, b"transfer-encoding"):
                await self.app(scope, receive, send)
                return
            body = await bodies.read(receive, serving.limits.size)
            if body is None:
                return  # the client has disconnected before the end of its request
            bodies.require_few_containers(body, serving.limits.containers, form=bodies.is_form(scope))
            request = None
            if kind is Kind.STEERED:
                value = parsed(body)
                if serving.experiments or bodies.header(scope, ARM_HEADER):
                    part = await _part(scope, route[1], value, serving)
                    if part is not None:
                        send = measured = MeasuredAnswer(send, part, scope)
                        value, body = part.body, json.dumps(part.body).encode()
                        scope = bodies.with_length(scope, body)
                if part is None:
                    request = _request(scope, route[1], value, body, serving)
                else:
                    request = _of_the_arm(part, scope, route[1], body, serving)
            elif kind is Kind.REFUSED:
                await _require_unsteered(scope, body, serving)
            elif kind is Kind.TOKENS:
                body = _of_the_model(body, serving)
                scope = bodies.with_length(scope, body)
        except TooLarge as error:
            metrics.refused("size")
            await send_json(send, 413, error.body, close=error.close)
            return
        except _Refusal as refusal:
            await send_json(send, refusal.status, refusal.body)
            return
        try:
            if request is None:
                await self.app(scope, bodies.replay(body, receive), send)
                if route[1] in WEIGHTS and serving.weights_changed is not None:
                    await serving.weights_changed()
                return
            content, http, names = request
            if measured is not None and part is not None:
                http.arm, measured.request = f"{part.live.experiment.name}:{part.decision.arm.name}", http
            await self._steered(scope, receive, send, serving, content, http, names)
        finally:
            if measured is not None:
                measured.finish()

    async def _steered(
        self, scope: Message, receive: Receive, send: Send, serving: Serving, content: bytes, http: HttpRequest,
        names: tuple[str, str] | None,
    ) -> None:  # fmt: skip
        """Run a steered request; `names` are (served, requested) where the answer names another model."""
        receipts.use(http)
        # From here on the request keeps its vectors, whatever names are bound or unbound meanwhile.
        try:
            with serving.admission.residency.holding(http.resolved.vectors.values()):
                await self.app(
                    bodies.with_length(scope, content),
                    bodies.replay(content, receive),
                    SteeredAnswer(send, http, names),
                )
        finally:
            receipts.use(None)

    async def _websocket(self, scope: Message, receive: Receive, send: Send, serving: Serving) -> None:
        """Pass a WebSocket on, and close it when the client asks for steering."""
        reason = f"{scope['path']} can't be steered"[:120]
        if _steering_in_query(scope, serving) is not None:
            metrics.refused("route")
            await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": reason})
            return

        async def checked() -> Message:
            message = await receive()
            if message["type"] != "websocket.receive":
                return message
            content = message.get("text") or message.get("bytes") or b""
            if len(content) > serving.limits.size:
                return await closed("size", MESSAGE_TOO_BIG, f"a message has more than {serving.limits.size} bytes")
            if steering_in(parsed(content), serving) is None:
                return message
            return await closed("route", POLICY_VIOLATION, reason)

        async def closed(counted: str, code: int, why: str) -> Message:
            metrics.refused(counted)
            await send({"type": "websocket.close", "code": code, "reason": why})
            return {"type": "websocket.disconnect", "code": code, "reason": why}

        await self.app(scope, checked, send)


async def _part(scope: Message, route: str, value: Any, serving: Serving) -> Exposed | None:
    """The part that a request takes in an experiment; None for one that is in none. Raises _Refusal."""
    live = serving.experiment_of(value.get("model")) if isinstance(value, dict) else None
    adapters = serving.adapters.get(live.experiment.name, {}) if live is not None else {}
    await recall(scope, route, value, live)
    try:
        return exposed(scope, route, value, live, serving.base, adapters)
    except Refused as error:
        raise _bad("experiment", error.parameter[:60], str(error)) from error


def _of_the_arm(part: Exposed, scope: Message, route: str, body: bytes, serving: Serving) -> _Steered | None:
    """`_request` for the arm of an experiment. Raises _Refusal where it can't be served, or only with other vectors
    than the experiment was started with: a failure of this server, since no client asks for steering in one."""
    arm = part.decision.arm
    try:
        request = _request(scope, route, part.body, body, serving)
    except _Refusal as refusal:
        message = f"the arm {arm.name} can't be served: {refusal}"
        raise _Refusal(503, "ServiceUnavailableError", "model", message) from refusal
    if request is not None and request[1].resolved.key != arm.composition:
        metrics.refused("experiment")
        message = f"a vector of the arm {arm.name} was replaced; start the server again"
        raise _Refusal(503, "ServiceUnavailableError", "model", message)
    return request


def _request(scope: Message, route: str, value: Any, body: bytes, serving: Serving) -> _Steered | None:
    """A steered request as (body for vLLM, HttpRequest, names); `names` is (served model, requested model) for an arm.

    `value` is the body, parsed. None for a request that is not steered, or that vLLM will refuse. Raises _Refusal.
    """
    if not isinstance(value, dict):
        return None
    admission = serving.admission
    extra, arm, names, version = value.get(ARGUMENTS), None, None, None
    expression = extra.get(EXPRESSION) if isinstance(extra, dict) else None
    steered = isinstance(extra, dict) and EXPRESSION in extra
    if isinstance(extra, dict) and RESOLVED in extra:
        raise _bad("field", ARGUMENTS, f"{RESOLVED} can't be set by a client; use {EXPRESSION}")
    field = misplaced(value)
    if field is not None:
        raise _bad("field", field[:60], f"{field[:60]!r} would be ignored, and the answer not be steered: {FORM}")
    named = serving.arm_of(value.get("model"))
    if named is not None:
        (base, arm), arms = named, dict(admission.arms)
        if arm not in arms:
            metrics.refused("arm")
            known = ", ".join(f"{base[:100]}:{name}" for name in list(arms)[:LISTED]) or "none"
            known += f" and {len(arms) - LISTED} more: GET /steer/arms" if len(arms) > LISTED else ""
            message = f"there is no arm {arm[:100]!r} of {base[:100]}; arms: {known}"
            raise _Refusal(404, "NotFoundError", "model", message)
        if extra is not None and not isinstance(extra, dict):
            raise _bad("field", ARGUMENTS, f"{ARGUMENTS} is {json.dumps(extra)[:60]}, not an object")
        if expression is not None:
            raise _bad(
                "field", ARGUMENTS, f"the request names the arm {arm!r} and steer {repr(expression)[:60]}: give one"
            )
        expression, steered, names = str(arms[arm]), True, (base, value["model"])
        if arm in serving.followed:
            followed = serving.followed[arm]
            conversation, _, begins = conversation_of(scope, value, user_of(route, value))
            version = followed.version_for(conversation, begins)
            expression = version.expression
        value = {**value, "model": base, ARGUMENTS: {**(extra or {}), EXPRESSION: expression}}
        body = json.dumps(value).encode()
    if not steered:
        return None
    if is_true(value.get("use_beam_search")):
        raise _bad("route", "use_beam_search", "beam search can't be steered: vLLM passes it no expression")
    try:
        resolved = admission.resolve(expression)
    except SteerError as error:  # counted by admission
        raise _Refusal(400, "BadRequestError", f"{ARGUMENTS}.{EXPRESSION}", explain(error)) from error
    http = HttpRequest(arm, str(expression), resolved)
    if version is not None:
        http.version = {"name": serving.followed[str(arm)].name, "commit": version.commit}
        http.answered = functools.partial(_continued, serving.followed[str(arm)], version)
    return body, http, names


def _continued(followed: Followed, version: Version, answer: str) -> None:
    """A conversation that continues this answer, by its id, keeps the version."""
    if answer:
        followed.remember(answer, version)


def _of_the_model(body: bytes, serving: Serving) -> bytes:
    """The body with an arm replaced by its model, whose tokens are the same. An unknown arm is left to vLLM."""
    value = parsed(body)
    named = serving.arm_of(value.get("model")) if isinstance(value, dict) else None
    if isinstance(value, dict) and isinstance(value.get("model"), str) and value["model"] in serving.experiments:
        return json.dumps({**value, "model": serving.base}).encode()
    if named is None or named[1] not in serving.admission.arms:
        return body
    return json.dumps({**value, "model": named[0]}).encode()


async def _require_unsteered(scope: Message, body: bytes, serving: Serving) -> None:
    """Refuse a request that asks for steering on a route that can't be steered. Raises _Refusal."""
    field = steering_in(parsed(body), serving) or _steering_in_query(scope, serving)
    for name, header in scope["headers"]:
        if name.lower() == ADAPTER_HEADER and serving.names_steering(header.decode("latin-1")):
            field = ADAPTER_HEADER.decode()
        if name.lower() == b"content-type" and b"form" in header.lower():
            field = field or _steering_in_fields(await _form(scope, body), serving)
    if field is not None:
        raise _bad("route", field[:60], f"{scope['path'][:100]} can't be steered, so that {field[:60]!r} is refused")


def _steering_in_query(scope: Message, serving: Serving) -> str | None:
    """The parameter of the URL with which a request asks for steering."""
    return _steering_in_fields(parse_qsl(scope.get("query_string", b"").decode("latin-1")), serving)


def _steering_in_fields(fields: Iterable[tuple[str, str]], serving: Serving) -> str | None:
    """The first of these (name, text) fields that asks for steering; a name may occur several times."""
    return next((field for name, text in fields if (field := steering_in({name: text}, serving)) is not None), None)


async def _form(scope: Message, body: bytes) -> list[tuple[str, str]]:
    """The fields of a form, without its files; none for a body that is no form, which vLLM refuses itself."""

    async def once() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request({"type": "http", "headers": scope["headers"]}, once).form() as form:
            return [(key, value) for key, value in form.multi_items() if isinstance(value, str)]
    except (MultiPartException, ValueError):
        return []


def _bad(reason: str, parameter: str, message: str) -> _Refusal:
    """A refusal with status 400, counted in the metrics under this reason."""
    metrics.refused(reason)
    return _Refusal(400, "BadRequestError", parameter, message)
