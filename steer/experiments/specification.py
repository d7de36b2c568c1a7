"""What an experiment is: its arms, units, metrics and guardrails, as immutable values with one digest.

`document` reads them from a file. The digest covers everything that decides who is served what and what is concluded;
where the log lies is not part of it. Another digest is another version of the experiment.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vectors.expression import parse
from vectors.probe import Probe
from vectors.steering import SteeringVector
from vectors.storage.files import digest_bytes, digest_json

KINDS = ("bool", "number")
PER = ("unit", "response")
DIRECTIONS = ("higher", "lower")
UNITS = ("conversation", "user")
ON_BREACH = ("stop", "warn")
CALLED = ("experiment", "model")
METHODS = ("track-and-stop",)  # of an adaptive allocation

# The metrics that the server computes of every answer, by name: the column of the exposures that holds them.
SERVER_METRICS = ("response_tokens", "ttft", "inter_token", "latency", "repetition", "refusal", "characters")

# Guardrails by name: the default limit, and what is compared with it.
GUARDRAILS: Mapping[str, tuple[float, str]] = {
    "error_rate": (0.02, "share of failed requests, above the control's"),
    "latency_p95": (1.5, "95th percentile of the time to the last token, over the control's"),
    "length_ratio": (2.0, "mean number of tokens, over the control's"),
    "repetition": (0.1, "mean share of repeated 4-grams of words, above the control's"),
    "refusals": (0.1, "share of answers that refuse, above the control's"),
}
RATIOS = ("latency_p95", "length_ratio")  # those whose limit is a factor, 1 for the control's own figure


@dataclass(frozen=True)
class Arm:
    """One arm: an expression, a LoRA adapter, a system prompt, any of these together, or nothing (the control).

    `composition` is the digest that the engine's receipt shows for the expression; `digest` covers all parts.
    """

    name: str
    weight: float
    steer: str = ""  # canonical text of the expression
    vectors: Mapping[str, str] = field(default_factory=dict)  # digest of each vector and probe, by its name in it
    lora: str = ""  # the adapter's folder
    lora_digest: str = ""
    system: str = ""
    written: str = ""  # the expression as the file has it, which may name versions of the store
    commit: str = ""  # where the expression is one version of the store: its commit

    @property
    def plain(self) -> bool:
        """Whether the arm changes nothing."""
        return not (self.steer or self.lora or self.system)

    @functools.cached_property
    def conditional(self) -> bool:
        """Whether a term of the arm acts under a condition, which is decided while the model runs."""
        return bool(self.steer) and bool(parse(self.steer).conditions)

    @functools.cached_property
    def composition(self) -> str:
        """The digest of the steering, as in the engine's receipt; empty where the arm is not steered."""
        return digest_json({"expression": self.steer, "vectors": dict(self.vectors)}) if self.steer else ""

    @functools.cached_property
    def digest(self) -> str:
        """The digest of everything that the arm does to a request."""
        return digest_json({"steer": self.composition, "lora": self.lora_digest, "system": self.system})

    def text(self) -> str:
        """What the arm does, on one line."""
        parts = [self.steer, f"LoRA {self.lora}" if self.lora else "", f"system prompt {self.system[:60]!r}"]
        return " and ".join(part for part in parts[: 2 + bool(self.system)] if part) or "nothing (control)"


@dataclass(frozen=True)
class Metric:
    """A metric: of feedback, of a judge, or computed by the server (`SERVER_METRICS`). `better` is its direction.

    With `per` unit it is the mean over units of each unit's mean; with `per` response the mean over all answers, a
    ratio of two sums over units. Of feedback, an answer or a conversation has the newest value that was given for it.
    """

    name: str
    kind: str = "bool"
    better: str = "higher"
    smallest_effect: float | None = None  # the difference that would matter, in the metric's unit; of the primary one
    baseline: float | None = None  # expected mean of the control, for the number of conversations needed
    spread: float | None = None  # expected standard deviation of a number
    low: float | None = None  # bounds of a number, where it has some
    high: float | None = None
    per: str = "unit"

    @property
    def source(self) -> str:
        """`server` for a metric that is computed of every answer, else `feedback` (users and judges)."""
        return "server" if self.name in SERVER_METRICS else "feedback"

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The least and the greatest value, where the metric has both."""
        if self.kind == "bool" or self.name in ("refusal", "repetition"):
            return 0.0, 1.0
        return None if self.low is None or self.high is None else (self.low, self.high)

    def frozen(self) -> dict[str, Any]:
        """What the digest covers, as JSON values; `per` is newer than some logs, so its default is left out."""
        return {key: value for key, value in vars(self).items() if (key, value) != ("per", "unit")}


@dataclass(frozen=True)
class Judge:
    """A judge of sampled answers, whose scores are a metric of this name.

    It is an OpenAI-compatible endpoint (`url`, `model`, `instruction`), or a scorer of texts as `steer eval` has them
    (`scorer`, such as `classifier:org/name`, or `probe:FILE`, which the served model reads). `digest` is that of the
    probe.
    """

    name: str
    url: str = ""
    model: str = ""
    instruction: str = ""
    scorer: str = ""
    sample_rate: float = 0.1
    key_variable: str = ""  # the environment variable with the endpoint's API key
    digest: str = ""

    def frozen(self) -> dict[str, Any]:
        """What the digest of an experiment covers, as JSON values; `digest` is newer than some logs."""
        return {key: value for key, value in vars(self).items() if (key, value) != ("digest", "")}


@dataclass(frozen=True)
class Namespace:
    """Experiments of one namespace with disjoint ranges never share a unit. The range is [start, end) of 0 to 1."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Allocation:
    """How the weights of an adaptive experiment change: each arm keeps `smallest_share` of the new units (forced
    exploration), and epochs with weights of their own are at least `every` seconds long."""

    method: str = METHODS[0]
    smallest_share: float = 0.05
    every: int = 60


@dataclass(frozen=True)
class Experiment:
    """A checked experiment. `vectors` are those of its arms and `probes` what their conditions read, by name; `file`
    is where it was read."""

    name: str
    arms: tuple[Arm, ...]
    metric: Metric
    salt: str
    model: str = ""  # empty: whatever model is served
    unit: str = "conversation"  # or "user", or "header:NAME" with the name in lower case
    coverage: float = 1.0
    namespace: Namespace | None = None
    allocation: Allocation | None = None  # none: the weights stay as they are
    secondary: tuple[Metric, ...] = ()
    guardrails: Mapping[str, float] = field(default_factory=dict)
    judges: tuple[Judge, ...] = ()
    ramp: tuple[float, ...] = ()
    ramp_responses: int = 200  # of every arm, before the next step
    on_breach: str = "stop"
    clients_call: str = "experiment"
    store_texts: bool = False
    log: str = ""  # the URL of the database
    file: Path = Path()
    vectors: Mapping[str, SteeringVector] = field(default_factory=dict)
    probes: Mapping[str, Probe | SteeringVector] = field(default_factory=dict)
    readouts: Mapping[str, Probe] = field(default_factory=dict)  # of judges that are probes, by the judge's name
    files: Mapping[str, Path] = field(default_factory=dict)  # of the vectors that the file binds to names

    @functools.cached_property
    def control(self) -> Arm:
        """The arm that changes nothing."""
        return next(arm for arm in self.arms if arm.plain)

    def arm(self, name: str) -> Arm | None:
        """The arm of this name."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def metrics(self) -> dict[str, Metric]:
        """The primary metric, then the others, by name."""
        return {metric.name: metric for metric in (self.metric, *self.secondary)}

    @functools.cached_property
    def steps(self) -> tuple[float, ...]:
        """The coverage of every stage: those of the ramp below the full coverage, then the full coverage."""
        return (*(step for step in self.ramp if step < self.coverage), self.coverage)

    def frozen(self) -> dict[str, Any]:
        """What the digest covers, as JSON values. The salt is given by its digest: who reads the log must not know it,
        since with it the hash of a known unit could be found in the log."""
        return {
            "name": self.name,
            "model": self.model,
            "unit": self.unit,
            "salt": digest_bytes(self.salt.encode()),
            "coverage": self.coverage,
            "namespace": vars(self.namespace) if self.namespace else None,
            "arms": [
                {"name": arm.name, "weight": arm.weight, "digest": arm.digest, "steer": arm.steer,
                 "vectors": dict(arm.vectors), "lora": arm.lora_digest, "system": arm.system}
                for arm in self.arms
            ],
            "metric": self.metric.frozen(),
            "secondary": [metric.frozen() for metric in self.secondary],
            "guardrails": dict(self.guardrails),
            "judges": [judge.frozen() for judge in self.judges],
            "ramp": list(self.ramp),
            "ramp_responses": self.ramp_responses,
            "on_breach": self.on_breach,
            # Newer than some logs.
            **({"allocation": vars(self.allocation)} if self.allocation else {}),
        }  # fmt: skip

    @functools.cached_property
    def digest(self) -> str:
        """The digest of the frozen experiment, which names its version."""
        return digest_json(self.frozen())
