"""What was applied to an answer: the engine's receipts, collected for the HTTP request that waits for them."""

from __future__ import annotations

import contextvars
from typing import Any

_CURRENT: contextvars.ContextVar[Sheet | None] = contextvars.ContextVar("steer_sheet", default=None)


class Sheet:
    """The receipts of one HTTP request, which may hold several prompts and several answers to each."""

    def __init__(self, arm: str | None) -> None:
        self.arm = arm
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


def current() -> Sheet | None:
    """The sheet of the HTTP request that this code runs for, None outside one."""
    return _CURRENT.get()


def use(sheet: Sheet) -> None:
    """Let everything that this task starts write to a sheet."""
    _CURRENT.set(sheet)
