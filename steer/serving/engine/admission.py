"""In the front end: the loaded vectors and arms, and the check whether a request can be steered as it asks.

A request that can't be steered is refused here, before the engine takes it in.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from probes.models.markers import Markers
from steer.experiments.running import readouts
from steer.serving.engine import bounds, metrics
from steer.serving.engine.phases import phases
from steer.serving.engine.residency import Residency
from steer.serving.engine.resolved import (
    EXPRESSION,
    GIVEN,
    PROMPT_SALT,
    RESOLVED,
    ResolvedRequest,
    names_of,
    parsed,
    prompt_length,
    remembered,
)
from steer.serving.settings import Settings, check_name, read_arm
from vectors import fit
from vectors.errors import ArtifactError, ExpressionError, SteerError, UsageError
from vectors.expression import Composition, parse
from vectors.probe import Probe
from vectors.registry.layers import spans
from vectors.steering import SteeringVector
from vectors.storage.files import digest_json

ARMS = 1000  # most arms of one server
SALT = "steer:"  # prefix of the cache salt of every steered request, and of no other request
_ESCAPE = "user:"
MOST_VECTORS = 1000  # names of vectors, so that uploads can't fill the memory
SHOWN = 20  # most names, and most problems, that an error lists


class Bound(NamedTuple):
    """What a name stands for, and the digest of its file."""

    source: SteeringVector | Probe
    digest: str


class Admission:
    """The vectors and arms of one server. `base` is the identity of the served model, None where it is not known.

    `hidden`, `layers` (their number), `dtype` and `markers` are those of the model. Names are bound and unbound under a
    lock, since requests are resolved in several threads.
    """

    def __init__(
        self,
        settings: Settings,
        hidden: int,
        layers: int,
        base: Mapping[str, Any] | None,
        dtype: torch.dtype = torch.float32,
        markers: Markers | None = None,
    ) -> None:
        self.settings, self.hidden, self.layers, self.base, self.dtype = settings, hidden, layers, base, dtype
        self.markers = markers
        self.residency = Residency()
        self.lock = threading.Lock()
        sources: dict[str, SteeringVector | Probe] = {**settings.vectors, **settings.probes}
        self.bound = {name: Bound(each, each.digest) for name, each in sources.items()}
        self.arms = dict(settings.arms)
        problems = [problem for name, each in sources.items() for problem in self.unfit(name, each)]
        other = "use vectors of this model, or allow vectors of other models of the same size: --any-base"
        hint = other if problems else "change the arms"
        for name, composition in self.arms.items():
            problems += [f"arm {name!r}: {problem}" for problem in self.problems(composition)]
        for experiment in settings.experiments:
            for what, composition in readouts.compositions(experiment).items():
                found = self.problems(composition)
                problems += [f"experiment {experiment.name}, {what}: {problem}" for problem in found]
        if problems:
            raise UsageError(problems, hint)
        for vector in settings.vectors.values():
            bounds.measure(vector)

    def unfit(self, name: str, vector: SteeringVector | Probe) -> list[str]:
        """The reasons why a vector can't steer the served model, or a probe not read it; empty when it can."""
        model: dict[str, Any] = {"hidden_size": self.hidden, "layers": self.layers, "base": self.base}
        if isinstance(vector, Probe):
            return fit.problems_of_probe(name, vector, **model, any_base=self.settings.any_base)
        return fit.problems_of(name, vector, **model, any_base=self.settings.any_base)

    def problems(self, composition: Composition) -> list[str]:
        """The reasons why this server can't apply a composition; empty when it can."""
        names = names_of(composition)
        sources = {name: self.bound[name].source for name in names if name in self.bound}
        vectors = {name: each for name, each in sources.items() if isinstance(each, SteeringVector)}
        reasons = []
        unknown = [name for name in names if name not in sources]
        if unknown:
            loaded = _listed(sorted(self.bound)) or "none"
            reasons.append(f"no vector is called {_listed(map(repr, unknown))}; loaded: {loaded}")
        added = [name for name in composition.names if name in sources and name not in vectors]
        reasons += [f"{name} is a probe, which can be read (@when:{name}>0) but not added" for name in added]
        for name, layers in dict.fromkeys((term.name, term.layers) for term in composition.terms):
            vector = vectors.get(name)
            missing = [i for i in layers or () if vector is not None and i not in vector.layers]
            if vector is not None and missing:
                reasons.append(f"{name} holds no layer {spans(missing)[:80]}; it holds {spans(vector.layers)}")
        reasons += fit.problems_of_means(composition, vectors)
        if not reasons:
            reasons = bounds.problems_of_conditions(composition, sources, self.settings, self.markers)
        if not reasons and not self.settings.allow_strength:
            excessive = fit.problems_of_strength(composition, vectors)
            reasons += [f"{reason}; a server that is started with --allow-strength takes it" for reason in excessive]
        if len(reasons) > SHOWN:
            reasons[SHOWN:] = [f"and {len(reasons) - SHOWN} more"]
        return reasons or bounds.problems_of(composition, vectors, self.settings, self.dtype)

    def resolve(self, text: Any) -> ResolvedRequest:
        """Parse and check an expression, and fix the vectors that its names stand for now. Raises ExpressionError."""
        try:
            if not isinstance(text, str):
                raise ExpressionError(f"steer is {repr(text)[:80]}, not an expression", "write a string: 0.8*warm")
            if too_many := bounds.problems_of_text(text, self.settings):
                raise ExpressionError(too_many, "write fewer terms")
            composition = parse(text)
            with self.lock:
                problems = self.problems(composition)
                if not problems:
                    return self._resolved(remembered(composition))
            unknown = any(name not in self.bound for name in names_of(composition))
            raise ExpressionError(problems, "GET /steer lists the vectors" if unknown else "")
        except ExpressionError:
            metrics.refused("expression")
            raise

    def _resolved(self, composition: Composition) -> ResolvedRequest:
        """What a composition stands for now."""
        return ResolvedRequest(str(composition), {name: self.bound[name].digest for name in names_of(composition)})

    def admit(self, request: Any) -> None:
        """Resolve the expression of an engine request (vLLM's), unless HTTP has resolved it, and salt its cache key.

        The salt is needed because a steered prompt has other keys and values than the same prompt unsteered, while
        vLLM's cache key covers the tokens only. Raises ValueError.
        """
        parameters = request.sampling_params
        extra = (parameters.extra_args if parameters is not None else None) or {}
        resolved = extra.get(RESOLVED)
        # A client can send any JSON value, but never an object of this class.
        if RESOLVED in extra and not isinstance(resolved, ResolvedRequest):
            raise ValueError(f"{RESOLVED} can't be set by a client; use {EXPRESSION}")
        given, whole = extra.get(GIVEN, 0), len(request.prompt_token_ids or ())
        if type(given) is not int or not 0 <= given <= max(whole - 1, 0):
            raise ValueError(f"{GIVEN} is {repr(given)[:40]}, not a number of the {whole} tokens given, less one")
        if resolved is None and EXPRESSION not in extra:
            request.cache_salt = unsteered_salt(request.cache_salt)
            return
        if request.resumable:
            raise ValueError("a request with streaming input can't be steered; send the whole prompt at once")
        if resolved is None:
            try:
                resolved = self.resolve(extra[EXPRESSION])
            except SteerError as error:
                raise ValueError(explain(error)) from error
        composition, salt = parsed(resolved.expression), request.cache_salt
        if len(phases(composition)) == 1:
            parameters.extra_args = {**extra, RESOLVED: resolved.values()}
            request.cache_salt = SALT + digest_json([resolved.key, None, salt])
            return
        # Under a scope or a condition, a token is steered differently in a prompt and in a response. A prompt that
        # repeats an earlier response must not reuse the keys and values of that response, so the salt contains the
        # prompt's length. The prompt alone is reused wherever prompts are steered equally.
        request.cache_salt = SALT + digest_json([resolved.key, prompt_length(request), salt])
        prompt_key = resolved.prompt_key
        shared = unsteered_salt(salt) if prompt_key is None else SALT + digest_json([prompt_key, None, salt])
        parameters.extra_args = {**extra, RESOLVED: {**resolved.values(), PROMPT_SALT: shared}}
        if given and composition.conditions:
            # Its last prompt token, which decides, lies before the end of what is given, and must be computed.
            parameters.skip_reading_prefix_cache = True

    def require_bindable(self, name: str, vector: SteeringVector | Probe, digest: str) -> None:
        """Refuse a name that is invalid or taken, and a vector or probe of another model. Raises SteerError."""
        check_name(name)
        problems = self.unfit(name, vector)
        if problems:
            raise ArtifactError(problems, "use a vector of the served model")
        if isinstance(vector, Probe) and not self.settings.gates:
            raise UsageError(
                "this server was started without gates, which read probes", "start it with --steer-gates 1"
            )
        if name in self.bound and self.bound[name].digest != digest:
            raise UsageError(f"a vector is called {name!r} already", f"DELETE /steer/vectors/{name} first")
        if name not in self.bound and len(self.bound) >= MOST_VECTORS:
            raise UsageError(
                f"this server holds {len(self.bound)} vectors already", "DELETE those that are no longer needed"
            )

    def bind(self, name: str, vector: SteeringVector | Probe, digest: str) -> bool:
        """Bind a name to a vector or probe for later requests; return whether the name is new. Raises SteerError."""
        with self.lock:
            self.require_bindable(name, vector, digest)
            new = name not in self.bound
            self.bound[name] = Bound(vector, digest)
        return new

    def unbind(self, name: str) -> str:
        """Unbind a name for later requests; return the vector's digest. Raises UsageError."""
        with self.lock:
            if name not in self.bound:
                raise UsageError(f"no vector is called {name!r}", "GET /steer/vectors lists them")
            arms = [arm for arm, composition in self.arms.items() if name in names_of(composition)]
            if arms:
                raise UsageError(
                    f"{name!r} is part of the arm {', '.join(arms)}", f"DELETE /steer/arms/{arms[0]} first"
                )
            return self.bound.pop(name).digest

    def add_arm(self, name: str, text: str) -> ResolvedRequest:
        """Name an expression for later requests, and return what it stands for now. Raises SteerError."""
        if too_many := bounds.problems_of_text(text, self.settings):
            raise UsageError([f"arm {name!r}: {problem}" for problem in too_many], "write fewer terms")
        composition = read_arm(name, text)
        with self.lock:
            if self.arms.get(name, composition) != composition:
                raise UsageError(
                    f"an arm is called {name!r} already: {self.arms[name]}", f"DELETE /steer/arms/{name} first"
                )
            if name not in self.arms and len(self.arms) >= ARMS:
                raise UsageError(f"this server has {ARMS} arms, the most it keeps", "DELETE /steer/arms/NAME first")
            problems = self.problems(composition)
            if problems:
                raise UsageError([f"arm {name!r}: {problem}" for problem in problems], "GET /steer lists the vectors")
            self.arms[name] = composition
            return self._resolved(composition)

    def replace_arm(self, name: str, text: str) -> Composition:
        """Let an arm stand for another expression for later requests, and return it. Raises SteerError."""
        composition = read_arm(name, text)
        with self.lock:
            problems = bounds.problems_of_text(text, self.settings) or self.problems(composition)
            if problems:
                raise UsageError([f"arm {name!r}: {problem}" for problem in problems], "GET /steer lists the vectors")
            self.arms[name] = composition
        return composition

    def resolved_arms(self) -> dict[str, ResolvedRequest]:
        """What every arm stands for now, by name. Arms are not checked again: their vectors can't be unbound."""
        with self.lock:
            return {name: self._resolved(arm) for name, arm in self.arms.items()}

    def remove_arm(self, name: str) -> Composition:
        """Take an arm from later requests; return its expression. Raises UsageError."""
        with self.lock:
            if name not in self.arms:
                raise UsageError(f"no arm is called {name!r}", "GET /steer/arms lists them")
            return self.arms.pop(name)

    def path(self, text: str) -> Path:
        """The path that a client gave, if it lies in one of the `--vector-folder` folders. Raises UsageError."""
        if not self.settings.folders:
            raise UsageError(
                "this server loads no vectors by path", "start it with --vector-folder FOLDER, or send the file"
            )
        for folder in self.settings.folders:
            # Raised for a path that is too long, contains a null byte, or is a circular link.
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                path = (folder / text).resolve()
                if path.is_relative_to(folder.resolve()) and path.is_file() and path.suffix == ".safetensors":
                    return path
        # The same error whether the file is missing or outside: clients can't probe for files outside the folders.
        raise UsageError(f"{text!r} is not a .safetensors file in the folders of this server", "check the name")


def _listed(names: Iterable[str]) -> str:
    """Names as text, of bounded length."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(name[:100] for name in listed[:SHOWN]) + more


def unsteered_salt(salt: str | None) -> str | None:
    """A client's cache salt, changed where it could equal that of a steered request. Different salts stay different."""
    return _ESCAPE + salt if salt is not None and salt.startswith((SALT, _ESCAPE)) else salt


def explain(error: SteerError) -> str:
    """An error and its hint on one line."""
    return "; ".join(error.problems) + (f" (hint: {error.hint})" if error.hint else "")
