"""The HTTP request behind an engine request: what it was resolved to, and what the engine applied to its answers."""

from __future__ import annotations

import contextvars
from typing import Any

from steer.serving.engine.resolved import ResolvedRequest

_CURRENT: contextvars.ContextVar[HttpRequest | None] = contextvars.ContextVar("steer_request", default=None)


class HttpRequest:
    """A steered HTTP request: what it was resolved to, once, and the receipts of its engine requests.

    It may hold several prompts and several answers to each.
    """

    def __init__(self, arm: str | None, expression: str, resolved: ResolvedRequest) -> None:
        self.arm, self.expression, self.resolved = arm, expression, resolved
        self.expected: set[str] = set()
        self.receipts: dict[str, dict[str, Any]] = {}

    def expect(self, request: str) -> None:
        """An engine request that belongs to this one."""
        self.expected.add(request)

    def add(self, request: str, receipt: dict[str, Any]) -> None:
        """The receipt of an engine request."""
        self.receipts[request] = receipt

    @property
    def complete(self) -> bool:
        """Whether every engine request has its receipt."""
        return bool(self.expected) and self.expected <= self.receipts.keys()

    def total(self) -> dict[str, Any] | None:
        """One receipt for all answers: tokens are summed. None when there is none."""
        found = list(self.receipts.values())
        if not found:
            return None
        result = {key: found[0][key] for key in ("digest", "expression")}
        for key in ("prompt_tokens", "cached_tokens", "response_tokens"):
            result[key] = sum(receipt[key] for receipt in found)
        result["terms"] = [
            {**term, **{key: sum(r["terms"][i][key] for r in found) for key in ("prompt_tokens", "response_tokens")}}
            for i, term in enumerate(found[0]["terms"])
        ]
        return {"arm": self.arm, **result, "answers": len(found)}


def current() -> HttpRequest | None:
    """The HTTP request that this code runs for, None outside a steered one."""
    return _CURRENT.get()


def use(request: HttpRequest | None) -> None:
    """Let everything that this task starts belong to a request."""
    _CURRENT.set(request)
