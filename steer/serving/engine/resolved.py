"""A composition as it travels with a request: its canonical text, and its vectors by digest.

Names can be bound to other vectors while a server runs, but a request keeps the vectors that it began with. The front
end resolves names to digests once, and slots, cache salt and receipt are all derived from the digests.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from steer.serving.engine.phases import phases
from vectors.expression import Composition, parse
from vectors.storage.files import canonical_json, digest_bytes

EXPRESSION = "steer"  # key in a request's extra arguments: the expression as the client wrote it
RESOLVED = "steer_resolved"  # key beside it: the resolved request, set by admission
# Key beside it: how many of the last tokens given are a response that is only scored. Scopes take them as a response.
GIVEN = "steer_given_response"
PROMPT_SALT = "prompt_salt"  # key in the values of a resolved request: the cache salt of its prompt, set by admission

MOST_PARSED = 256
_PARSED: OrderedDict[str, Composition] = OrderedDict()  # those used last, by their canonical text
_LOCK = threading.Lock()  # requests are resolved in several threads


def parsed(expression: str) -> Composition:
    """The composition of a resolved request: each is read in several places, and for some receipts at every step."""
    with _LOCK:
        if expression in _PARSED:
            _PARSED.move_to_end(expression)
            return _PARSED[expression]
    return remembered(parse(expression))


def remembered(composition: Composition) -> Composition:
    """The same composition, which `parsed` finds from now on."""
    with _LOCK:
        _PARSED[str(composition)] = composition
        if len(_PARSED) > MOST_PARSED:
            _PARSED.popitem(last=False)
    return composition


def names_of(composition: Composition) -> tuple[str, ...]:
    """The names of a composition's vectors, and of the probes that its conditions read, each once."""
    return tuple(dict.fromkeys((*composition.names, *composition.probes)))


@dataclass(frozen=True)
class ResolvedRequest:
    """An expression as canonical text, and the digest of each vector and probe by its name in the expression."""

    expression: str
    vectors: dict[str, str]

    @functools.cached_property  # it is compared for every request at every step
    def key(self) -> str:
        """The digest of the text and the vectors' digests: equal keys are equal steering. The receipt shows it."""
        return digest_bytes(canonical_json({"expression": self.expression, "vectors": self.vectors}).encode())

    @functools.cached_property
    def prompt_key(self) -> str | None:
        """The key of what acts on the prompt: equal keys steer a prompt equally. None where nothing acts on it."""
        composition = parsed(self.expression)
        terms = tuple(replace(composition.terms[i], scope=None) for i in phases(composition)[0].terms)
        vectors = {term.name: self.vectors[term.name] for term in terms}
        return ResolvedRequest(str(Composition(terms)), vectors).key if terms else None

    @staticmethod
    def of(extra: Mapping[str, Any] | None) -> ResolvedRequest | None:
        """The resolved request in a request's extra arguments; None for a request that is not steered.

        Raises RuntimeError for a request with an expression that did not pass admission.
        """
        if not extra or (EXPRESSION not in extra and RESOLVED not in extra):
            return None
        values = extra.get(RESOLVED)
        if values is None:
            raise RuntimeError("steer: a request that asks for steering did not pass admission")
        return ResolvedRequest(values["expression"], dict(values["vectors"]))

    def values(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {"expression": self.expression, "vectors": dict(self.vectors)}


def resolved_of(request: Any) -> ResolvedRequest | None:
    """The resolved request of a request (vLLM's); None for one that is not steered, such as a pooling request."""
    parameters = request.sampling_params
    return ResolvedRequest.of(parameters.extra_args if parameters is not None else None)


def prompt_length(request: Any) -> int:
    """The number of tokens in the prompt of a request (any of vLLM's request types), without a given response."""
    ids, parameters = request.prompt_token_ids, request.sampling_params
    given = ((parameters.extra_args if parameters is not None else None) or {}).get(GIVEN, 0)
    return (len(ids) if ids is not None else len(request.prompt_embeds)) - given
