"""The HTTP request that an engine request belongs to: its resolved composition, and the receipts of its answers."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

from steer.serving.engine.resolved import ResolvedRequest

_CURRENT: contextvars.ContextVar[HttpRequest | None] = contextvars.ContextVar("steer_request", default=None)


class HttpRequest:
    """A steered HTTP request: its resolved composition, and the receipts of its engine requests.

    There is one engine request for each prompt and each answer to it (`n`).
    """

    def __init__(
        self, arm: str | None, expression: str, resolved: ResolvedRequest, version: dict[str, str] | None = None
    ) -> None:
        self.arm, self.expression, self.resolved = arm, expression, resolved
        self.version = version  # the name and the commit, of an arm that is a version
        self.answered: Callable[[str], None] = lambda identity: None  # is called with the id of the answer
        self.refused = False  # whether the engine has refused to steer it
        self.expected: set[str] = set()
        self.receipts: dict[str, dict[str, Any]] = {}

    def expect(self, request: str) -> None:
        """Expect a receipt from this engine request, given by id."""
        self.expected.add(request)

    def add(self, request: str, receipt: dict[str, Any]) -> None:
        """Add the receipt of an engine request, given by id."""
        self.receipts[request] = receipt

    @property
    def complete(self) -> bool:
        """Whether every engine request has its receipt."""
        return bool(self.expected) and self.expected <= self.receipts.keys()

    def total(self) -> dict[str, Any] | None:
        """One receipt for all answers, with token counts summed; None before the first receipt."""
        receipts = list(self.receipts.values())
        if not receipts:
            return None
        result = {key: receipts[0][key] for key in ("digest", "expression")}
        for key in ("prompt_tokens", "cached_tokens", "response_tokens"):
            result[key] = sum(receipt[key] for receipt in receipts)
        result["terms"] = [
            {**term, **{key: sum(r["terms"][i][key] for r in receipts) for key in ("prompt_tokens", "response_tokens")}}
            for i, term in enumerate(receipts[0]["terms"])
        ]
        if "gates" in receipts[0]:  # one entry for each answer, since each may be decided otherwise
            result["gates"] = [gate for receipt in receipts for gate in receipt["gates"]]
        version = {} if self.version is None else {"version": self.version}
        return {"arm": self.arm, **version, **result, "answers": len(receipts)}


def current() -> HttpRequest | None:
    """The steered HTTP request that the current task serves, None for any other."""
    return _CURRENT.get()


def use(request: HttpRequest | None) -> None:
    """Make this the current HTTP request of this task and of the tasks that it starts."""
    _CURRENT.set(request)
