"""The terms of an expression: an operation with a vector, the tokens it acts on, and the conditions it depends on."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vectors.errors import ExpressionError
from vectors.registry.layers import spans

# Of a term: adding it, adding a share of the token's norm, ablating, ablating to the mean, clamping, rotating.
OPERATIONS = ("add", "share", "ablate", "mean_ablate", "clamp", "rotate")
FUNCTIONS = ("ablate", "clamp", "rotate")  # that are written as name(vector, value)
HALF_TURN = 180.0  # degrees
KINDS = ("when", "while")  # of conditions that read the model
SECTIONS = ("answer", "thinking", "outside-tools")  # of a response, which conditions of these kinds name
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}
LARGEST_SCORE = 3.4028234663852886e38  # the largest float32
_PLAIN_NAME = re.compile(r"[^\W\d][\w.]*")


@dataclass(frozen=True)
class Scope:
    """The tokens a term acts on: `kind` is prompt, response, first or after, the latter two with a `count`."""

    kind: str
    count: int = 0

    def __str__(self) -> str:
        return f"@{self.kind}:{self.count}" if self.kind in ("first", "after") else f"@{self.kind}"

    @property
    def responds(self) -> bool:
        """Whether the scope covers only tokens of the response."""
        return self.kind != "prompt"

    def span(self, prompt_length: int) -> tuple[int, float]:
        """The positions [start, stop) of a sequence that the scope covers, given the prompt's length in tokens."""
        return {
            "prompt": (0, prompt_length),
            "response": (prompt_length, math.inf),
            "first": (prompt_length, prompt_length + self.count),
            "after": (prompt_length + self.count, math.inf),
        }[self.kind]


RESPONSE = Scope("response")


@dataclass(frozen=True)
class Condition:
    """A comparison of what a probe, or a vector, reads with a threshold (`vectors.probe.reading_of`).

    `kind` is "when": decided once, at the last token of the prompt, for the whole response; or "while": decided at
    every token of the response, from the state of that token. `layer` None is the layer that is read by default. A
    kind of SECTIONS has no more than its kind: it holds where a token of the response lies in that section, which the
    tokens up to it decide.
    """

    kind: str
    name: str = ""
    comparison: str = ""  # one of COMPARISONS
    threshold: float = 0.0
    layer: int | None = None

    @property
    def is_section(self) -> bool:
        """Whether it names a section of the response, and reads no layer."""
        return self.kind in SECTIONS

    def __str__(self) -> str:
        if self.is_section:
            return f"@{self.kind}"
        layer = "" if self.layer is None else f"[{self.layer}]"
        return f"@{self.kind}:{name_text(self.name)}{layer}{self.comparison}{number_text(self.threshold)}"

    @property
    def never(self) -> bool:
        """Whether no score fulfils it, since scores are float32; then its terms act nowhere, and it is only read."""
        above, below = self.threshold > LARGEST_SCORE, self.threshold < -LARGEST_SCORE
        return (above and self.comparison == ">") or (below and self.comparison == "<")

    def holds(self, value: Any) -> Any:
        """Whether a value fulfils it; of a tensor of values, a bool tensor."""
        return COMPARISONS[self.comparison](value, self.threshold)


@dataclass(frozen=True)
class Term:
    """One operation with one vector.

    `value` is the strength of `add`, `ablate` and `mean_ablate`, the level of `clamp`, the percentage of `share`, and
    the degrees of `rotate`. A term acts where its scope covers the token and all its conditions hold. One with
    conditions acts on the response only: without a scope its scope is that of the response. Raises ExpressionError for
    one that acts on the prompt, and for a rotation beyond a half turn.
    """

    operation: str  # one of OPERATIONS
    name: str
    value: float = 1.0
    layers: tuple[int, ...] | None = None  # None: the layers at which the vector acts by default
    scope: Scope | None = None  # None: everywhere
    conditions: tuple[Condition, ...] = ()

    def __post_init__(self) -> None:
        if self.operation == "rotate" and abs(self.value) > HALF_TURN:
            raise ExpressionError(
                f"rotate({name_text(self.name)}) has {number_text(self.value)} degrees, more than a half turn",
                f"give from -{HALF_TURN:g} to {HALF_TURN:g}",
            )
        if not self.conditions:
            return
        if self.scope is None:
            object.__setattr__(self, "scope", RESPONSE)
        elif not self.scope.responds:
            raise ExpressionError(
                f"{self} acts on the prompt, and a term with a condition can only act on the response",
                f"leave out {self.scope}, or the condition",
            )

    def __str__(self) -> str:
        vector = name_text(self.name)
        if self.layers is not None:
            vector += f"[{spans(self.layers)}]"
        number = number_text(self.value)
        if self.operation == "add":
            text = vector if self.value == 1 else f"{number}*{vector}"
        elif self.operation == "share":
            text = f"{vector}%{number}"
        elif self.operation in ("ablate", "mean_ablate"):
            strength = "" if self.value == 1 else f", {number}"
            text = f"ablate({vector}{strength}{', to=mean' if self.operation == 'mean_ablate' else ''})"
        else:
            text = f"{self.operation}({vector}, {number})"
        if self.scope is not None and not (self.conditions and self.scope == RESPONSE):
            text += str(self.scope)
        return text + "".join(map(str, self.conditions))


def name_text(name: str) -> str:
    """A name as an expression has it, in quotes where it needs them."""
    if _PLAIN_NAME.fullmatch(name):
        return name
    return f'"{name}"' if "'" in name else f"'{name}'"


def number_text(value: float) -> str:
    """The shortest text that is read as the same number."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
