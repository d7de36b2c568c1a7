"""Every request form against an application's routes: what reaches a handler steered, unsteered, or not at all.

Used with a small application of known routes, and as a program with vLLM's own application, whose handlers are
replaced by stand-ins while its router and middleware stay.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import fakes
from starlette.responses import JSONResponse

from steer.serving.engine import receipts
from steer.serving.engine.admission import Admission
from steer.serving.http.bodies import Limits
from steer.serving.http.fields import Serving
from steer.serving.http.routes import STEERED
from steer.serving.settings import Settings
from vectors.expression import parse

KEY = "secret"
LIMITS = Limits(1 << 20, 10_000)
BODIES: dict[str, dict[str, Any]] = {
    "arm": {"model": "model:friendly"},
    "expression": {"model": "model", "vllm_xargs": {"steer": "warm"}},
    "misspelt": {"model": "model", "vllm_xargs": {"stear": "warm"}},
    "top": {"model": "model", "steer": "warm"},
    "inside": {"model": "model", "sampling_params": {"extra_args": {"steer": "warm"}}},
    "plain": {"model": "model"},
}


def serving(*, any_model: bool = False) -> Serving:
    """A server of the model `model` with the arm `friendly`."""
    admission = Admission(Settings(fakes.vectors(), {"friendly": parse("2*warm")}), fakes.HIDDEN, fakes.LAYERS, None)
    return Serving(admission, {"model"}.__contains__, LIMITS, any_model)


def forms(path: str) -> Iterator[tuple[str, str]]:
    """The ways to write a path: (what is special, the path on the wire)."""
    yield "as it is", path
    yield "trailing slash", path + "/"
    yield "double slash", "/" + path
    yield "inner double slash", path.replace("/", "//")
    yield "percent", "/" + "/".join("".join(f"%{ord(c):02X}" for c in part) for part in path[1:].split("/"))
    yield "encoded slash", "/" + quote(path[1:], safe="").replace("/", "%2F")
    yield "capitals", path.upper()
    yield "dots", "/x/.." + path
    yield "semicolon", path + ";x"


async def ask(app: Any, method: str, path: str, body: bytes, root: str = "", **headers: str) -> tuple[int, bytes]:
    """Send a request as uvicorn would; the status and body of the answer."""
    from urllib.parse import unquote

    sent: list[Any] = []
    head = {"content-type": "application/json", "authorization": f"Bearer {KEY}", "content-length": str(len(body))}
    head |= {name.replace("_", "-"): value for name, value in headers.items()}
    pairs = [(name.encode(), value.encode()) for name, value in head.items()]
    whole = [{"type": "http.request", "body": body, "more_body": False}]
    path, _, query = path.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": root + unquote(path), "raw_path": (root + path).encode(), "query_string": query.encode(),
        "root_path": root, "headers": pairs, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip

    async def receive() -> Any:
        if whole:
            return whole.pop()
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


async def handler(scope: Any, receive: Any, send: Any) -> None:
    """The stand-in for every handler: answers with what reached it, and with a receipt where the request is steered."""
    body = b""
    more = True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    http = receipts.current()
    if http is not None:
        http.expect("r")
        counts = {"prompt_tokens": 1, "cached_tokens": 0, "response_tokens": 1, "terms": []}
        http.add("r", {"digest": http.resolved.key, "expression": http.resolved.expression, **counts})
    reached = {"reached": body.decode("latin-1"), "route": scope.get("trial_route", "")}
    await JSONResponse(reached)(scope, receive, send)


def stand_in(path: str) -> Any:
    """`handler` for the route with this path template, which its answer names."""

    async def named(scope: Any, receive: Any, send: Any) -> None:
        await handler({**scope, "trial_route": path}, receive, send)

    return named


async def trial(app: Any, paths: list[str], root: str = "") -> list[dict[str, Any]]:
    """What becomes of every body in every form of every path with every method that may carry one."""
    results = []
    for path in paths:
        for form, written in forms(path.replace("{", "").replace("}", "")):
            for method in ("POST", "PUT", "PATCH", "HEAD", "GET", "DELETE") if form == "as it is" else ("POST",):
                for name, body in BODIES.items():
                    status, content = await ask(app, method, written, json.dumps(body).encode(), root)
                    try:
                        answer = json.loads(content)
                    except ValueError:
                        answer = None
                    reached = isinstance(answer, dict) and "reached" in answer
                    results.append(
                        {
                            "path": answer["route"] if reached else path, "form": form, "method": method, "body": name,
                            "status": status, "reached": reached, "steered": reached and "steer" in answer,
                            "message": "" if reached else content.decode("latin-1")[:300],
                        }
                    )  # fmt: skip
    return results


def of_vllm(flags: list[str], tasks: tuple[str, ...], root: str, tried: set[tuple[str, str]]) -> dict[str, Any]:
    """The routes of vLLM's application, and the trial over those that were not tried and those that steer.

    Runs in a process of its own: vLLM keeps state.
    """
    from starlette.routing import Mount
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from steer.serving.http.endpoints import Endpoints

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--api-key", KEY, *flags])
    args.enable_fault_tolerance = bool(flags)
    Endpoints._find = lambda self: serving()  # type: ignore[method-assign,assignment]
    app = build_app(args, tasks, None)  # type: ignore[arg-type]
    table = []
    for route in app.routes:
        for method in ["MOUNT"] if isinstance(route, Mount) else getattr(route, "methods", None) or ["WEBSOCKET"]:
            table.append((method, getattr(route, "path", repr(route))))
        if not isinstance(route, Mount) and getattr(route, "methods", None):
            route.app = stand_in(route.path)
    untried = {(method, path) for method, path in table if (method, path) not in tried or path in STEERED}
    paths = sorted({path for method, path in untried if method not in ("MOUNT", "WEBSOCKET")})
    return {"table": table, "results": asyncio.run(trial(app, paths, root))}


def main() -> None:
    """Print the routes and the results for vLLM's application with each set of flags, as one JSON object a line."""
    everything = ("generate", "transcription", "realtime", "embed", "classify", "score", "token_embed")
    tried: set[tuple[str, str]] = set()
    for flags, tasks, root in (
        ([], ("generate",), ""),
        (["--enable-scale-out", "--enable-tokenizer-info-endpoint"], everything, "/prefix"),
    ):
        found = of_vllm(flags, tasks, root, tried)
        print("TRIAL", json.dumps(found), flush=True)
        tried |= set(found["table"])


if __name__ == "__main__":
    sys.path.insert(0, ".")
    main()
