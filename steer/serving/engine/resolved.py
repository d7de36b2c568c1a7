"""A composition as it travels with a request: its canonical text, and its vectors by digest.

Names can be bound anew while a server runs. What a request began with is what it keeps, so the front end replaces the
name's meaning by digests once, and everything behind it (slots, cache salt, receipt) goes by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vectors.files import canonical_json, digest_bytes

EXPRESSION = "steer"  # in a request's extra arguments: the expression as it was written
RESOLVED = "steer_resolved"  # beside it: what admission made of it


@dataclass(frozen=True)
class ResolvedRequest:
    """An expression in canonical text, and the digest of every vector that it names."""

    expression: str
    vectors: dict[str, str]

    @property
    def key(self) -> str:
        """Equal for equal steering: a digest of the text and the vectors' digests. It is the receipt's digest."""
        return digest_bytes(canonical_json({"expression": self.expression, "vectors": self.vectors}).encode())

    @staticmethod
    def of(extra: Mapping[str, Any] | None) -> ResolvedRequest | None:
        """What a request's extra arguments ask for; None for a request that is not steered.

        Raises RuntimeError for one that asks for steering but did not pass admission.
        """
        if not extra or (EXPRESSION not in extra and RESOLVED not in extra):
            return None
        found = extra.get(RESOLVED)
        if found is None:
            raise RuntimeError("steer: a request that asks for steering did not pass admission")
        return ResolvedRequest(found["expression"], dict(found["vectors"]))

    def values(self) -> dict[str, Any]:
        """As JSON values."""
        return {"expression": self.expression, "vectors": dict(self.vectors)}


def resolved_of(request: Any) -> ResolvedRequest | None:
    """What a request (vLLM's) asks for; None for one that is not steered, such as a pooling request."""
    parameters = request.sampling_params
    return ResolvedRequest.of(parameters.extra_args if parameters is not None else None)


def prompt_length(request: Any) -> int:
    """Tokens of the prompt of a request (vLLM's, at any stage)."""
    ids = request.prompt_token_ids
    return len(ids) if ids is not None else len(request.prompt_embeds)
