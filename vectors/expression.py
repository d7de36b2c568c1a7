"""The expression language, in which commands, requests and files write a composition of vectors.

    expression  = [ "+" | "-" ] term { ( "+" | "-" ) term }
    term        = ( [ number "*" ] vector | operation ) [ "@" scope ]
    operation   = ( "ablate" | "clamp" ) "(" vector [ "," number ] ")"
    vector      = name [ "[" layer [ "-" layer ] { "," layer [ "-" layer ] } "]" ]
    scope       = "prompt" | "response" | "first:" count | "after:" count

A name is letters, digits, `_` and `.`, beginning with a letter or `_`; any other is quoted: `'warm-v2'`.

Every operation reads the residual stream h as it was before the composition, and the changes are summed:

    s*name            h + s v                     v the direction; strength 1 is one mean displacement
    ablate(name, s)   h - s <h, u> u              u = v / |v|; s defaults to 1
    clamp(name, x)    h + (x |v| - <h, u>) u      x in units of strength

Scopes count tokens from the request's true prompt: `@first:N` is the first N tokens of the response, `@after:N`
those of the response that follow them.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, replace
from typing import NoReturn

from vectors.documents.artifacts import HIGHEST_LAYER
from vectors.errors import ExpressionError
from vectors.registry.layers import spans
from vectors.storage.files import digest_bytes

LONGEST = 4096  # characters of an expression
MOST_LAYERS = 8192  # layers that the terms of an expression name in all; a range of a few characters names a thousand
OPERATIONS = ("ablate", "clamp")

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[^\W\d][\w.]*)"
    r"|'(?P<single>[^']*)'|\"(?P<double>[^\"]*)\"|(?P<symbol>[-+*()\[\],@:]))"
)
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


@dataclass(frozen=True)
class Term:
    """One operation with one vector. `value` is the strength of `add` and `ablate`, the level of `clamp`."""

    operation: str  # "add", "ablate" or "clamp"
    name: str
    value: float = 1.0
    layers: tuple[int, ...] | None = None  # None: the layers at which the vector acts by default
    scope: Scope | None = None  # None: everywhere

    def __str__(self) -> str:
        vector = self.name if _PLAIN_NAME.fullmatch(self.name) else _quoted(self.name)
        if self.layers is not None:
            vector += f"[{spans(self.layers)}]"
        number = _number(self.value)
        if self.operation == "add":
            text = vector if self.value == 1 else f"{number}*{vector}"
        elif self.operation == "ablate" and self.value == 1:
            text = f"ablate({vector})"
        else:
            text = f"{self.operation}({vector}, {number})"
        return text + (str(self.scope) if self.scope else "")


@dataclass(frozen=True)
class Composition:
    """A sequence of terms: an immutable value with one canonical text and one digest."""

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return self._text

    @functools.cached_property
    def _text(self) -> str:
        text = ""
        for term in self.terms:
            if term.operation == "add" and term.value < 0:
                body = str(replace(term, value=-term.value))
                text += f" - {body}" if text else f"-{body}"
            else:
                text += f" + {term}" if text else str(term)
        return text

    @property
    def digest(self) -> str:
        """`sha256:` of the canonical text."""
        return digest_bytes(str(self).encode())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the vectors, each once, in order of occurrence."""
        return tuple(dict.fromkeys(term.name for term in self.terms))

    def scaled(self, factor: float) -> Composition:
        """The composition with every strength multiplied by `factor`.

        Raises ExpressionError for a clamp, which sets a level, and for strengths that are not finite.
        """
        if any(term.operation == "clamp" for term in self.terms):
            raise ExpressionError(
                f"{self} can't be scaled by {_number(factor)}: clamp sets a level, not a strength",
                "write one expression for each level",
            )
        terms = tuple(replace(term, value=term.value * factor) for term in self.terms)
        if not all(math.isfinite(term.value) for term in terms):
            raise ExpressionError(
                f"{self} can't be scaled by {factor!r}: its strengths would not be finite", "use a smaller factor"
            )
        return Composition(terms)


def parse(text: str) -> Composition:
    """Read an expression. Raises ExpressionError with the position of the mistake and what was expected there."""
    composition = _Parser(text).expression()
    _require_length(str(composition))  # the canonical text, which must be readable too, may be longer than `text`
    return composition


def terms_in(text: str) -> int:
    """The number of terms of an expression, without parsing it; an upper bound for a text that is no expression."""
    count, inside, before = 1, 0, ""
    for match in _TOKEN.finditer(text[:LONGEST]):
        symbol = match["symbol"] or ""
        # Signs in lists of layers, or after a comma in an operation, or before the first term, begin no term.
        inside += (symbol in ("(", "[")) - (symbol in (")", "]"))
        count += symbol in ("+", "-") and not inside and before != "" and before not in ("+", "-")
        before = symbol or "a word"
    return count


def _require_length(text: str) -> None:
    if len(text) > LONGEST:
        raise ExpressionError(f"the expression has {len(text)} characters; the limit is {LONGEST}", "shorten it")


def _quoted(name: str) -> str:
    return f'"{name}"' if "'" in name else f"'{name}'"


def _number(value: float) -> str:
    """The shortest text that is read as the same number."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


class _Parser:
    """A recursive-descent parser; a class because the position lives across its methods."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.end = len(text.rstrip())
        self.position = 0
        self.peeked: tuple[int, re.Match[str] | None] = (-1, None)  # a position, and what was read there
        self.named = 0  # layers that the terms so far name
        _require_length(text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ExpressionError(f"the expression {text[:60]!r} is not valid Unicode", "write it in UTF-8") from error

    def fail(self, expected: str, at: int | None = None) -> NoReturn:
        at = self.position if at is None else at
        at += len(self.text[at:]) - len(self.text[at:].lstrip())
        actual = repr(self.text[at : at + 12]) if at < len(self.text) else "the end"
        excerpt = self.text if len(self.text) <= 60 else self.text[max(0, at - 30) : at + 30]
        raise ExpressionError(
            f"the expression {excerpt!r} is wrong at character {at + 1}: {expected} expected, {actual} found",
            "an example of an expression: 1.2*warm - 0.4*formal[12-15] + ablate(refusal)@response",
        )

    def peek(self) -> re.Match[str] | None:
        if self.position >= self.end:
            return None
        if self.peeked[0] != self.position:
            self.peeked = self.position, _TOKEN.match(self.text, self.position)
        match = self.peeked[1]
        if match is None:
            self.fail("a number, a name or one of + - * ( ) [ ] , @ :")
        return match

    def take(self, symbol: str) -> bool:
        match = self.peek()
        if match is None or match["symbol"] != symbol:
            return False
        self.position = match.end()
        return True

    def need(self, symbol: str) -> None:
        if not self.take(symbol):
            self.fail(f"`{symbol}`")

    def expression(self) -> Composition:
        if not self.text.strip():
            raise ExpressionError("the expression is empty", "name a vector, such as: warm")
        negative = self.take("-")
        if not negative:
            self.take("+")
        terms = [self.term(negative)]
        while self.peek() is not None:
            negative = self.take("-")
            if not negative and not self.take("+"):
                self.fail("`+`, `-` or `@`")
            terms.append(self.term(negative))
        return Composition(tuple(terms))

    def term(self, negative: bool) -> Term:
        start = self.position
        match = self.peek()
        if match is None:
            self.fail("a term")
        sign = -1.0 if negative else 1.0
        if match["number"]:
            value = self.number()
            self.need("*")
            if self.is_operation():
                self.fail("a vector after `*` (an operation takes its strength inside: ablate(name, 0.5))")
            name, layers = self.vector()
            term = Term("add", name, sign * value, layers)
        elif self.is_operation():
            if negative:
                self.fail("a vector after `-` (an operation can't be subtracted)", start)
            term = self.operation()
        else:
            name, layers = self.vector()
            term = Term("add", name, sign, layers)
        return replace(term, scope=self.scope()) if self.take("@") else term

    def is_operation(self) -> bool:
        match = self.peek()
        return match is not None and match["name"] is not None and self.text[match.end() :].lstrip().startswith("(")

    def operation(self) -> Term:
        match = self.peek()
        assert match is not None
        operation = match["name"]
        if operation not in OPERATIONS:
            self.fail(f"{' or '.join(OPERATIONS)}")
        self.position = match.end()
        self.need("(")
        name, layers = self.vector()
        value = 1.0
        if self.take(","):
            negative = self.take("-")
            value = self.number() * (-1 if negative else 1)
        elif operation == "clamp":
            self.fail("`,` and the value to clamp to, in units of strength")
        self.need(")")
        return Term(operation, name, value, layers)

    def number(self) -> float:
        match = self.peek()
        if match is None or not match["number"]:
            self.fail("a number")
        value = float(match["number"])
        if not math.isfinite(value):
            self.fail("a finite number")
        self.position = match.end()
        return value

    def vector(self) -> tuple[str, tuple[int, ...] | None]:
        match = self.peek()
        name = "" if match is None else match["name"] or match["single"] or match["double"] or ""
        if match is None or not name:
            self.fail("the name of a vector")
        self.position = match.end()
        return name, self.layers() if self.take("[") else None

    def layers(self) -> tuple[int, ...]:
        layers: set[int] = set()
        while True:
            start = self.position
            low = high = self.whole("a layer", HIGHEST_LAYER)
            if self.take("-"):
                high = self.whole("a layer", HIGHEST_LAYER)
            if high < low:
                self.fail("a range that ascends", start)
            self.named += high - low + 1
            if self.named > MOST_LAYERS:
                raise ExpressionError(
                    f"the expression names more than {MOST_LAYERS} layers, counted in every term", "name fewer layers"
                )
            layers.update(range(low, high + 1))
            if not self.take(","):
                break
        self.need("]")
        return tuple(sorted(layers))

    def whole(self, what: str, highest: int) -> int:
        match = self.peek()
        if match is None or not (match["number"] or "").isdigit() or int(match["number"]) > highest:
            self.fail(f"{what}, a whole number up to {highest},")
        self.position = match.end()
        return int(match["number"])

    def scope(self) -> Scope:
        match = self.peek()
        kind = match["name"] if match else None
        if match is None or kind not in ("prompt", "response", "first", "after"):
            self.fail("prompt, response, first:N or after:N")
        self.position = match.end()
        if kind in ("prompt", "response"):
            return Scope(kind)
        self.need(":")
        return Scope(kind, self.whole("a count of tokens", 10**9))
