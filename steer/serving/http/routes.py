"""What each route of vLLM does with steering, decided by the route that the application itself would run.

A route that is not listed here counts as one that generates text and can't be steered, so that a route which a new
version of vLLM adds is never served unsteered. A test compares this table with the routes of vLLM's application.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.routing import BaseRoute, Match, Mount


class Kind(enum.Enum):
    """What a route does with arms and expressions."""

    STEERED = "generates text, steered"
    REFUSED = "generates text or prepares to, and can't be steered: requests with an arm or an expression are refused"
    TOKENS = "counts or lists tokens: an arm stands for its model"
    OTHER = "generates no text: its requests are passed on unread"


STEERED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_REFUSED = (
    *("/invocations", "/inference/v1/generate", "/v1/chat/completions/batch", "/v1/systemone", "/generative_scoring"),
    *("/cohere/v2/chat", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/decisions"),
    # These return a prompt with its sampling parameters, for another server to run.
    *("/v1/chat/completions/render", "/v1/messages/render", "/v1/completions/render", "/v1/responses/render"),
)
FEEDBACK = "/v1/feedback"
WEIGHTS = ("/update_weight_version", "/finish_weight_update")  # after which the weights may have another version
_TOKENS = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
_OTHER = {
    "GET": (
        *("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc", "/load", "/version", "/kv_event_sources"),
        *("/health", "/metrics", "/ping", "/v1/models", "/tokenizer_info", "/server_info", "/is_sleeping"),
        *("/is_paused", "/weight_info", "/get_world_size", "/fault_tolerance/status"),
        # A response that was generated, with its steering, by an earlier POST.
        "/v1/responses/{response_id}",
        *("/steer", "/steer/vectors", "/steer/arms", "/steer/experiments"),
    ),
    "HEAD": ("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"),
    "POST": (
        *("/ping", "/v1/responses/{response_id}/cancel", "/scale_elastic_ep", "/is_scaling_elastic_ep"),
        *("/v1/chat/completions/derender", "/v1/completions/derender", "/inference/v1/abort_requests"),
        *("/abort_requests", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/fault_tolerance/apply"),
        *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/collective_rpc", "/sleep", "/wake_up"),
        *("/release_kv_cache_memory", "/pause", "/resume", "/start_profile", "/stop_profile"),
        *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update"),
        *("/start_draft_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version"),
        *("/weight_checker", "/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score"),
        *("/rerank", "/v1/rerank", "/v2/rerank", "/steer/vectors", "/steer/arms", "/v1/feedback"),
    ),
    "DELETE": ("/steer/vectors/{name}", "/steer/arms/{name}", "/adapters/{adapter_name}"),
    "MOUNT": ("/metrics", "/static"),
}

# The kind of every known route, by method and path template; a mounted application has the method MOUNT.
KINDS: Mapping[tuple[str, str], Kind] = {
    **{(method, path): Kind.OTHER for method, paths in _OTHER.items() for path in paths},
    **{("POST", path): Kind.TOKENS for path in _TOKENS},
    **{("POST", path): Kind.REFUSED for path in _REFUSED},
    ("WEBSOCKET", "/v1/realtime"): Kind.REFUSED,
    **{("POST", path): Kind.STEERED for path in STEERED},
}


def route_of(routes: Iterable[BaseRoute], scope: Mapping[str, Any]) -> tuple[str, str] | None:
    """The (method, path template) of the route that Starlette runs for a request; None when it runs none.

    The application's own matching decides, so that prefixes, percent-encoding and slashes mean here what they mean to
    the application. A request whose method a route does not accept runs none.
    """
    for route in routes:
        if route.matches(scope)[0] is Match.FULL:  # type: ignore[arg-type]
            method = "MOUNT" if isinstance(route, Mount) else scope.get("method", "WEBSOCKET")
            return method, str(getattr(route, "path", route))
    return None


def kind_of(route: tuple[str, str] | None) -> Kind:
    """What a route does with steering; OTHER when no route is run, REFUSED for an unknown route."""
    return Kind.OTHER if route is None else KINDS.get(route, Kind.REFUSED)


def bounds_its_bodies(route: tuple[str, str]) -> bool:
    """Whether a route has limits of its own for the bodies of its requests."""
    return route[1].startswith("/steer") or route[1] == FEEDBACK
