"""The expression language, in which commands, requests and files write a composition of vectors.

    expression  = [ "+" | "-" ] term { ( "+" | "-" ) term }
    term        = ( [ number "*" ] vector | vector "%" [ "-" ] number | operation ) { "@" restriction }
    operation   = "ablate" "(" vector [ "," number ] [ "," "to" "=" "mean" ] ")"
                | ( "clamp" | "rotate" ) "(" vector "," [ "-" ] number ")"
    vector      = name [ "[" layer [ "-" layer ] { "," layer [ "-" layer ] } "]" ]
    restriction = scope | section | condition
    scope       = "prompt" | "response" | "first:" count | "after:" count
    section     = "answer" | "thinking" | "outside-tools"
    condition   = ( "when:" | "while:" ) name [ "[" layer "]" ] ( ">" | "<" | ">=" | "<=" ) [ "-" ] number

A name is letters, digits, `_` and `.`, beginning with a letter or `_`; any other is quoted: `'warm-v2'`.

What each operation makes of the residual stream h:

    s*name                     h + s v                         v the direction; strength 1 is one mean displacement
    name%p                     h + p/100 |h| u                 u = v / |v|; a share of the token's own norm
    ablate(name, s)            h - s <h, u> u                  s defaults to 1
    ablate(name, s, to=mean)   h - s (<h, u> - m) u            m the mean of <h, u> that the extraction measured
    clamp(name, x)             h + (x |v| - <h, u>) u          x in units of strength
    rotate(name, d)            |h| (cos(a - d) u + sin(a - d) w)

A rotation turns h by d degrees in the plane that it and u span, and keeps its norm: a is the angle between h and u, w
the unit vector of what h is beyond u. It stops at the direction, and with negative degrees at its opposite.

Terms read the stream as it was before the composition, and their changes are summed, so that their order does not
matter. A rotation is a step of its own: it turns what the terms before it have made of the stream, and the terms behind
it read what it has made, up to the next rotation.

Scopes count tokens from the request's true prompt: `@first:N` is the first N tokens of the response, `@after:N`
those of the response that follow them. A term has at most one scope, and any number of conditions, all of which must
hold. A condition compares what a probe reads, or the projection on a vector in units of strength, with a threshold:
`@when:` once, at the last token of the prompt; `@while:` at every token of the response, by the state of that token. A
term with a condition acts on the response only, and what is read lies below every layer that the term steers.

Sections are conditions on the tokens alone: `@thinking` holds between the model's own markers of thinking, `@answer`
outside of them, and `@outside-tools` outside of calls of tools. The marker that begins is inside, the one that ends
outside.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, replace
from typing import NoReturn

from vectors.documents.artifacts import HIGHEST_LAYER
from vectors.errors import ExpressionError
from vectors.language.terms import COMPARISONS, FUNCTIONS, HALF_TURN, KINDS, number_text
from vectors.language.terms import OPERATIONS as OPERATIONS
from vectors.language.terms import Condition as Condition
from vectors.language.terms import Scope as Scope
from vectors.language.terms import Term as Term
from vectors.storage.files import digest_bytes

LONGEST = 4096  # characters of an expression
MOST_LAYERS = 8192  # layers that the terms of an expression name in all; a range of a few characters names a thousand

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[^\W\d][\w.]*)"
    r"|'(?P<single>[^']*)'|\"(?P<double>[^\"]*)\"|(?P<symbol>[<>]=|[-+*%=()\[\],@:<>]))"
)


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
            if term.operation in ("add", "share") and term.value < 0:
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

    @property
    def steps(self) -> tuple[int, ...]:
        """The terms, by index, that an engine computes one after another: shares, rotations, and all terms behind the
        first rotation. The changes of all others are one sum over the stream as it was before.
        """
        rotations = [i for i, term in enumerate(self.terms) if term.operation == "rotate" and term.value != 0]
        first = rotations[0] if rotations else len(self.terms)
        return tuple(i for i, term in enumerate(self.terms) if i >= first or term.operation == "share")

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The conditions of all terms, each once, in order of occurrence."""
        return tuple(dict.fromkeys(condition for term in self.terms for condition in term.conditions))

    @property
    def probes(self) -> tuple[str, ...]:
        """The names in the conditions, of probes or of vectors, each once, in order of occurrence."""
        return tuple(dict.fromkeys(each.name for each in self.conditions if not each.is_section))

    def scaled(self, factor: float) -> Composition:
        """The composition with every strength multiplied by `factor`.

        Raises ExpressionError for a clamp, which sets a level, for strengths that are not finite, and for a rotation
        beyond a half turn.
        """
        if any(term.operation == "clamp" for term in self.terms):
            raise ExpressionError(
                f"{self} can't be scaled by {number_text(factor)}: clamp sets a level, not a strength",
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
        # Signs in lists of layers, or after a comma in an operation, or of a threshold or a share, or before the first
        # term, begin no term.
        inside += (symbol in ("(", "[")) - (symbol in (")", "]"))
        count += symbol in ("+", "-") and not inside and before not in ("", "+", "-", "%", *COMPARISONS)
        before = symbol or "a word"
    return count


def _require_length(text: str) -> None:
    if len(text) > LONGEST:
        raise ExpressionError(f"the expression has {len(text)} characters; the limit is {LONGEST}", "shorten it")


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
            self.fail("a number, a name or one of + - * % ( ) [ ] , @ : < > =")
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
            share = self.take("%")
            term = Term("share" if share else "add", name, sign * (self.signed() if share else 1.0), layers)
        return self.restricted(term)

    def is_operation(self) -> bool:
        match = self.peek()
        return match is not None and match["name"] is not None and self.text[match.end() :].lstrip().startswith("(")

    def operation(self) -> Term:
        match = self.peek()
        assert match is not None
        operation, start = match["name"], self.position
        if operation not in FUNCTIONS:
            self.fail(" or ".join(FUNCTIONS))
        self.position = match.end()
        self.need("(")
        name, layers = self.vector()
        value = 1.0
        if operation == "clamp" and not self.take(","):
            self.fail("`,` and the value to clamp to, in units of strength")
        if operation == "rotate" and not self.take(","):
            self.fail("`,` and the degrees to turn by")
        if operation != "ablate":
            value = self.signed()
        elif self.take(","):
            if not (to_mean := self.to_mean()):
                value = self.signed()
                if self.take(",") and not (to_mean := self.to_mean()):
                    self.fail("`to=mean`")
            operation = "mean_ablate" if to_mean else "ablate"
        self.need(")")
        if operation == "rotate" and abs(value) > HALF_TURN:
            self.fail(f"degrees from -{HALF_TURN:g} to {HALF_TURN:g}", start)
        return Term(operation, name, value, layers)

    def to_mean(self) -> bool:
        match = self.peek()
        if match is None or match["name"] != "to":
            return False
        self.position = match.end()
        self.need("=")
        match = self.peek()
        if match is None or match["name"] != "mean":
            self.fail("`mean`")
        self.position = match.end()
        return True

    def signed(self) -> float:
        return -self.number() if self.take("-") else self.number()

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
        name = self.name("the name of a vector")
        return name, self.layers() if self.take("[") else None

    def name(self, what: str) -> str:
        match = self.peek()
        name = "" if match is None else match["name"] or match["single"] or match["double"] or ""
        if match is None or not name:
            self.fail(what)
        self.position = match.end()
        return name

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

    def restricted(self, term: Term) -> Term:
        """The term with the scope and the conditions that follow it."""
        scope: Scope | None = None
        conditions: list[Condition] = []
        while True:
            at = self.position
            if not self.take("@"):
                break
            match = self.peek()
            kind = match["name"] if match else None
            if kind in KINDS:
                conditions.append(self.condition())
            elif kind in ("answer", "thinking", "outside"):
                conditions.append(self.section())
            elif scope is None:
                scope = self.scope()
            else:
                self.fail("`+`, `-` or a condition (a term has one scope)", at)
        return replace(term, scope=scope, conditions=tuple(conditions))

    def scope(self) -> Scope:
        match = self.peek()
        kind = match["name"] if match else None
        if match is None or kind not in ("prompt", "response", "first", "after"):
            self.fail(
                "prompt, response, first:N, after:N, answer, thinking, outside-tools, when:PROBE>X or while:PROBE>X"
            )
        self.position = match.end()
        if kind in ("prompt", "response"):
            return Scope(kind)
        self.need(":")
        return Scope(kind, self.whole("a count of tokens", 10**9))

    def section(self) -> Condition:
        match = self.peek()
        assert match is not None
        kind, self.position = match["name"], match.end()
        if kind == "outside":
            rest = self.peek() if self.take("-") else None
            if rest is None or rest["name"] != "tools":
                self.fail("`outside-tools`")
            kind, self.position = "outside-tools", rest.end()
        return Condition(kind)

    def condition(self) -> Condition:
        match = self.peek()
        assert match is not None
        kind = match["name"]
        self.position = match.end()
        self.need(":")
        name = self.name("the name of a probe or a vector")
        layer: int | None = None
        if self.take("["):
            layer = self.whole("a layer", HIGHEST_LAYER)
            self.need("]")
        match = self.peek()
        comparison = match["symbol"] if match else None
        if match is None or comparison not in COMPARISONS:
            self.fail("one of > < >= <=")
        self.position = match.end()
        return Condition(kind, name, comparison, self.signed(), layer)
